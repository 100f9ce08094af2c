"""`eqvae score SAMPLES --reference REFERENCE --out DIR`."""

from collections.abc import Sequence

from eqvae.runs.arguments import parse
from eqvae.runs.score import ScoreConfig, score


def command(arguments: Sequence[str]) -> None:
    """Score and print the figures."""
    config = parse(ScoreConfig, "score", arguments)
    figures = score(config)
    for name, value in figures.items():
        if isinstance(value, int | float):
            shown = f"{value:.0f}" if isinstance(value, int) else f"{value:.6g}"
            print(f"{name:32} {shown}")  # noqa: T201
    if figures and (left_out := figures["provenance"]["left_out"]):
        print(f"left out: {', '.join(left_out)}; '{config.reference}' holds moments that don't give them")  # noqa: T201
