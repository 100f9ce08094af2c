"""`eqvae reproduce ITEM ... --scale tiny|paper --out ROOT`."""

from collections.abc import Sequence

from eqvae.paper.estimates import describe_plan
from eqvae.runs.arguments import parse
from eqvae.runs.reproduce import ReproduceConfig, reproduce


def command(arguments: Sequence[str]) -> None:
    """Reproduce, or print the plan of it."""
    config = parse(ReproduceConfig, "reproduce", arguments)
    if config.dry_run:
        print(describe_plan(config))  # noqa: T201
        return
    for file in reproduce(config):
        if file.suffix == ".md":
            print(file)  # noqa: T201
