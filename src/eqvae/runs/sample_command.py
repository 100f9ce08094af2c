"""`eqvae sample`."""

from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.sample import SampleConfig
from eqvae.runs.sample import command as run


def command(arguments: Sequence[str]) -> None:
    """Parse, run and print."""
    said = run(parse(SampleConfig, "sample", arguments))
    if said is not None:
        print(said)  # noqa: T201
