"""`eqvae reproduce ITEM ... --scale tiny|paper --out ROOT`."""

from collections.abc import Sequence

from eqvae.cli.arguments import parse
from eqvae.recipes.estimates import describe_plan
from eqvae.recipes.reproduction import ReproduceConfig, reproduce


def command(arguments: Sequence[str]) -> None:
    """Reproduce, or print the plan of it.

    Args:
        arguments: What follows the command's name.
    """
    config = parse(ReproduceConfig, "reproduce", arguments)
    if config.dry_run:
        print(describe_plan(config))  # noqa: T201
        return
    for file in reproduce(config):
        if file.suffix == ".md":
            print(file)  # noqa: T201
