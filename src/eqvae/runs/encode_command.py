"""`eqvae encode`."""

from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.encode import command as run


def command(arguments: Sequence[str]) -> None:
    """Parse, run and print."""
    said = run(parse(EncodeConfig, "encode", arguments))
    if said is not None:
        print(said)  # noqa: T201
