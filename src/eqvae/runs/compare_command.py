"""`eqvae compare RUN RUN ... --out DIR`."""

from collections.abc import Sequence

from eqvae.report.comparison_text import headline_lines
from eqvae.runs.arguments import parse
from eqvae.runs.compare import CompareConfig, compare_runs


def command(arguments: Sequence[str]) -> None:
    """Compare and print the headline."""
    config = parse(CompareConfig, "compare", arguments)
    comparison = compare_runs(config)
    for line in headline_lines(comparison):
        print(line)  # noqa: T201
