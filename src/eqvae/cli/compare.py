"""`eqvae compare RUN RUN ... --out DIR`."""

from collections.abc import Sequence

from eqvae.cli.arguments import parse
from eqvae.report.comparison_text import headline_lines
from eqvae.report.run_comparison import CompareConfig, compare_runs


def command(arguments: Sequence[str]) -> None:
    """Compare and print the headline.

    Args:
        arguments: What follows the command's name.
    """
    config = parse(CompareConfig, "compare", arguments)
    comparison = compare_runs(config)
    for line in headline_lines(comparison):
        print(line)  # noqa: T201
