"""Tables that compare autoencoders: one row for each, the best figure in each column, the change against the first."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eqvae.report.folders import Evaluation

MISSING = "\N{EN DASH}"
"""Stands where a table has nothing to say."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one figure is named, printed and judged."""

    key: str
    """Its key in metrics.json."""

    label: str

    better: Literal["lower", "higher", "neither"] = "lower"

    digits: int = 3
    """After the decimal point."""

    unit: str = ""

    error_key: str = ""
    """The key of its standard error, where it has one."""

    @property
    def arrow(self) -> str:
        """The direction of better figures."""
        return {"lower": "↓", "higher": "↑", "neither": ""}[self.better]

    def show(self, value: float) -> str:
        """Print a figure."""
        return with_minus_sign(f"{value:.{self.digits}f}")

    def show_change(self, before: float, after: float) -> str:
        """Print a change: in percent where lower is better (errors), else, and in dB, as a difference."""
        if self.better == "lower" and self.unit != "dB":
            return with_minus_sign(f"{100 * (after / before - 1):+.0f}%") if before else ""
        return with_minus_sign(f"{after - before:+.{self.digits}f} {self.unit}".strip())

    def improves(self, before: float, after: float) -> bool | None:
        """Whether the second figure is better."""
        if self.better == "neither" or self.show(before) == self.show(after):
            return None
        return (after < before) == (self.better == "lower")


METRICS = (
    Metric(key="equivariance_error_rotation", label="Rotation error"),
    Metric(key="equivariance_error_scale", label="Scale error"),
    Metric(key="psnr_db", label="PSNR", better="higher", digits=2, unit="dB"),
    Metric(key="ssim", label="SSIM", better="higher"),
    Metric(key="lpips", label="LPIPS"),
    Metric(key="latent_std", label="Latent std", better="neither", digits=2),
    Metric(key="token_agreement_rotation", label="Tokens kept, rotation", better="higher"),
    Metric(key="token_agreement_scale", label="Tokens kept, scale", better="higher"),
    Metric(key="codebook_usage", label="Codes used", better="higher"),
    Metric(key="codebook_perplexity", label="Codebook perplexity", better="higher", digits=0),
)
"""The columns of the main table; those that no evaluation has measured are left out. The last four are of discrete
autoencoders: shares of 1, but for the perplexity, which counts codes."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of a table."""

    text: str

    change: str = ""
    """Against the first row; empty in the first row and where the two may not be compared."""

    improves: bool | None = None

    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns are metrics; rows are autoencoders."""

    metrics: tuple[Metric, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    """Names and their cells."""


def comparison_table(evaluations: Sequence[Evaluation], metrics: Sequence[Metric] = METRICS) -> Table:
    """Compare evaluations with the first one."""
    present = tuple(m for m in metrics if any(figure(item, m.key) is not None for item in evaluations))
    rows = tuple((item.name, tuple(_cell(item, metric, evaluations) for metric in present)) for item in evaluations)
    return Table(metrics=present, rows=rows)


def transform_metrics(
    evaluations: Sequence[Evaluation], measure: str = "equivariance_error", digits: int = 3
) -> tuple[Metric, ...]:
    """Name the figures of single transformations: their equivariance errors, or another measure."""
    pattern = re.compile(re.escape(measure) + r"_(rotation|scale)_([0-9.]+)")
    keys = dict.fromkeys(key for item in evaluations for key in item.metrics)
    matches = sorted(
        (found for found in map(pattern.fullmatch, keys) if found), key=lambda found: (found[1], float(found[2]))
    )
    return tuple(
        Metric(key=found[0], label=f"{found[2]}°" if found[1] == "rotation" else f"s = {found[2]}", digits=digits)
        for found in matches
    )


def latent_statistics(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """Print the latents' statistics: fine-tuning moves their scale, and a generator must normalize by them."""
    rows = []
    for item in evaluations:
        cells: list[str] = []
        while (mean := figure(item, f"latent_mean_{len(cells)}")) is not None:
            std = figure(item, f"latent_std_{len(cells)}")
            cells.append(with_minus_sign(f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")))
        if cells:
            rows.append((item.name, cells))
    return rows


def figure(evaluation: Evaluation, key: str) -> float | None:
    """Look up a figure."""
    return finite(evaluation.metrics.get(key))


def show_figure(evaluation: Evaluation, metric: Metric) -> str | None:
    """Print a figure with its standard error."""
    value, error = figure(evaluation, metric.key), figure(evaluation, metric.error_key)
    if value is None:
        return None
    return metric.show(value) if error is None else f"{metric.show(value)} ± {metric.show(error)}"


def finite(value: Any) -> float | None:
    """Let finite numbers pass."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int = 1) -> str:
    """Write a table in Markdown."""
    alignment = ["---"] * num_text_columns + ["---:"] * (len(names) - num_text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, alignment, *rows))


def with_minus_sign(text: str) -> str:
    """Set the typographic minus sign, as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def _cell(evaluation: Evaluation, metric: Metric, evaluations: Sequence[Evaluation]) -> Cell:
    value, text = figure(evaluation, metric.key), show_figure(evaluation, metric)
    if value is None or text is None:
        return Cell(text=MISSING)
    reference = evaluations[0]
    if evaluation.conditions != reference.conditions:
        return Cell(text=text)
    rivals = [figure(item, metric.key) for item in evaluations if item.conditions == reference.conditions]
    comparisons = [metric.improves(rival, value) for rival in rivals if rival is not None]
    is_best = True in comparisons and False not in comparisons
    before = figure(reference, metric.key)
    if evaluation is reference or before is None:
        return Cell(text=text, is_best=is_best)
    change, improves = metric.show_change(before, value), metric.improves(before, value)
    return Cell(text=text, change=change, improves=improves, is_best=is_best)
