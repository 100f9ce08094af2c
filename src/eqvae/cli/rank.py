"""`eqvae rank AUTOENCODER AUTOENCODER ... --out ROOT`."""

from collections.abc import Sequence

from eqvae.cli.arguments import parse
from eqvae.recipes.ranking import RankConfig, rank


def command(arguments: Sequence[str]) -> None:
    """Rank, or go on with it, and print the table.

    Args:
        arguments: What follows the command's name.
    """
    print(rank(parse(RankConfig, "rank", arguments)).read_text(), end="")  # noqa: T201
