"""`eqvae score`."""

from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.score import ScoreConfig
from eqvae.runs.score import command as run


def command(arguments: Sequence[str]) -> None:
    """Parse, run and print."""
    said = run(parse(ScoreConfig, "score", arguments))
    if said is not None:
        print(said)  # noqa: T201
