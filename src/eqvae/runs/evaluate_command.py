"""`eqvae evaluate`."""

from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.evaluate import command as run


def command(arguments: Sequence[str]) -> None:
    """Parse, run and print."""
    said = run(parse(EvaluateConfig, "evaluate", arguments))
    if said is not None:
        print(said)  # noqa: T201
