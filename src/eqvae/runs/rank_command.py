"""`eqvae rank AUTOENCODER AUTOENCODER ... --out ROOT`."""

from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.rank import RankConfig, rank


def command(arguments: Sequence[str]) -> None:
    """Rank, or go on with it, and print the table."""
    print(rank(parse(RankConfig, "rank", arguments)).read_text(), end="")  # noqa: T201
