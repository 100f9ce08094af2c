"""The curves of a fine-tuning run, as charts of one quantity each.

Accent: the fine-tuned autoencoder and the equivariance branch. Grey: the base autoencoder and the plain branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy import ndarray

from eqvae.report.charts import ACCENT, BASE, INK, PAPER_STYLE, SIZE_INCHES, STYLE, to_page_svg
from eqvae.report.folders import Run
from eqvae.report.tables import METRICS, finite, with_minus_sign


@dataclass(frozen=True, kw_only=True)
class Series:
    """One quantity over the run's steps."""

    label: str
    """Empty where the panel has only one series."""

    color: str

    steps: Float64[ndarray, " n"]

    values: Float64[ndarray, " n"]

    is_noisy: bool = False
    """Draw the single values lightly and their moving average on top."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small chart."""

    title: str

    summary: str
    """For example `0.93 → 0.49`: for the caption, and for those who cannot see the chart."""

    y_label: str
    """With the unit."""

    series: tuple[Series, ...]

    base: float | None = None
    """The base autoencoder's figure, drawn as a dashed line."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A logged value and how its panel is labelled."""

    key: str
    title: str
    y_label: str
    is_noisy: bool = True


@dataclass(frozen=True, kw_only=True)
class PanelGroup:
    """Panels under one heading."""

    title: str
    panels: list[Panel] = field(default_factory=list)


TRAINING = {
    "Losses": (
        Quantity(key="reconstruction", title="Reconstruction", y_label="L1 + perceptual"),
        Quantity(key="l1", title="L1 of pixels", y_label="mean absolute error"),
        Quantity(key="perceptual", title="Perceptual", y_label="loss"),
        Quantity(key="kl", title="KL to N(0, I)", y_label="nats per image"),
        Quantity(key="explicit", title="Explicit equivariance", y_label="loss per image"),
    ),
    "Codebook": (
        Quantity(key="quantization", title="Quantization", y_label="squared distance to codes"),
        Quantity(key="codebook_usage", title="Codes used by a batch", y_label="share"),
        Quantity(key="codebook_perplexity", title="Perplexity of a batch", y_label="codes"),
    ),
    "Discriminator": (
        Quantity(key="adversarial", title="Adversarial loss", y_label="minus mean logit"),
        Quantity(key="discriminator", title="Discriminator loss", y_label="hinge loss"),
        Quantity(key="adaptive_weight", title="Adaptive weight", y_label="weight"),
    ),
    "Optimization": (
        Quantity(key="learning_rate", title="Learning rate", y_label="learning rate", is_noisy=False),
        Quantity(key="gradient_norm", title="Gradient norm", y_label="norm before clipping"),
    ),
}
"""Panels for what a training step logs; those that a run has not logged, or that are always 0, are left out."""


def run_panels(run: Run) -> list[PanelGroup]:
    """Choose what to draw of a run.

    Args:
        run: A fine-tuning run, finished or not.

    Returns:
        Groups of panels, none of them empty: validation first, then losses, discriminator and optimization.
    """
    groups = [PanelGroup(title="Validation", panels=_validation_panels(run))]
    records = run.records("train")
    for title, quantities in TRAINING.items():
        panels = [_training_panel(records, quantity) for quantity in quantities]
        groups.append(PanelGroup(title=title, panels=[panel for panel in panels if panel is not None]))
    return [group for group in groups if group.panels]


def draw_panel(panel: Panel, id_prefix: str = "chart") -> str:
    """Draw a panel as an SVG element for use inside HTML.

    Args:
        panel: What to draw.
        id_prefix: Keeps the element's ids apart from those of other charts on the page.

    Returns:
        `<svg ...>...</svg>`. Colours are CSS variables (`--accent`, `--base`, `--muted`, `--rule`) with fallbacks.
    """
    with matplotlib.rc_context(STYLE):
        chart = Figure(figsize=SIZE_INCHES, layout="constrained")
        _draw_axes(chart.add_subplot(), panel)
        return to_page_svg(chart, id_prefix)


def draw_run(run: Run) -> Figure:
    """Draw all panels of a run as one figure, for papers.

    Args:
        run: A fine-tuning run that has logged something, finished or not.

    Returns:
        A matplotlib figure, three panels wide.
    """
    panels = [panel for group in run_panels(run) for panel in group.panels]
    num_rows = -(-len(panels) // 3)
    with matplotlib.rc_context(PAPER_STYLE):
        chart = Figure(figsize=(3 * SIZE_INCHES[0], num_rows * (SIZE_INCHES[1] + 0.3)), layout="constrained")
        for axes, panel in zip(chart.subplots(num_rows, 3, squeeze=False).flat, panels, strict=False):
            _draw_axes(axes, panel)
            axes.set_title(panel.title, fontsize=10, loc="left")
        for axes in chart.axes[len(panels) :]:
            axes.remove()
    return chart


def _draw_axes(axes: Axes, panel: Panel) -> None:
    for series in panel.series:
        _draw_series(axes, series)
    if panel.base is not None:
        axes.axhline(panel.base, color=BASE, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "base", (1.0, panel.base), xycoords=axes.get_yaxis_transform(), xytext=(0, 3),
            textcoords="offset points", ha="right", va="bottom", color=INK, fontsize=9,
        )  # fmt: skip
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(y=0.12)


def smooth(values: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """Exponential moving average over about a tenth of the series, corrected for its start.

    Args:
        values: Finite numbers.

    Returns:
        As many numbers; the first equals the first value.
    """
    keep = 1.0 - 2.0 / (max(len(values) // 10, 1) + 1)
    total = weight = 0.0
    averages = np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        averages[index] = total / weight
    return averages


def _validation_panels(run: Run) -> list[Panel]:
    panels = []
    for metric in METRICS:
        series = _series(run.records("validation"), metric.key, "", ACCENT)
        if series is None:
            continue
        first, last = float(series.values[0]), float(series.values[-1])
        starts_at_base = series.steps[0] == 0
        panels.append(
            Panel(
                title=f"{metric.label} {metric.arrow}".strip(),
                summary=f"{metric.show(first)} → {metric.show(last)} {metric.unit}".strip(),
                y_label=metric.unit or ("relative squared error" if "error" in metric.key else metric.label),
                series=(series,),
                base=first if starts_at_base else None,
            )
        )
    return panels


def _training_panel(records: Sequence[dict], quantity: Quantity) -> Panel | None:
    """One series for each branch where the records tell them apart: their losses have different levels."""
    equivariance = [record for record in records if record.get("branch") == "equivariance"]
    plain = [record for record in records if record.get("branch", "equivariance") != "equivariance"]
    if quantity.is_noisy and equivariance and plain:
        candidates = [
            _series(plain, quantity.key, "plain", BASE, quantity.is_noisy),
            _series(equivariance, quantity.key, "equivariance", ACCENT, quantity.is_noisy),
        ]
    else:
        candidates = [_series(records, quantity.key, "", ACCENT, quantity.is_noisy)]
    series = tuple(item for item in candidates if item is not None)
    if not any(item.values.any() for item in series):
        return None
    return Panel(title=quantity.title, summary=_summary(series[-1]), y_label=quantity.y_label, series=series)


def _summary(series: Series) -> str:
    """First and last average of a noisy series; the peak of a schedule, whose ends say little."""
    if not series.is_noisy:
        return f"peak {_short(series.values.max())}"
    averages = smooth(series.values)
    return f"{_short(averages[0])} → {_short(averages[-1])}"


def _short(value: float) -> str:
    """Three digits, thousands in full."""
    return with_minus_sign(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def _series(records: Sequence[dict], key: str, label: str, color: str, is_noisy: bool = False) -> Series | None:
    """The finite values of one key; None where there are none."""
    points = [(record["step"], value) for record in records if (value := finite(record.get(key))) is not None]
    if not points:
        return None
    steps, values = np.array(points, dtype=np.float64).T
    return Series(label=label, color=color, steps=steps, values=values, is_noisy=is_noisy)


def _draw_series(axes: Axes, series: Series) -> None:
    if series.is_noisy:
        axes.plot(series.steps, series.values, color=series.color, alpha=0.28, linewidth=0.9)
        axes.plot(series.steps, smooth(series.values), color=series.color, linewidth=2.0)
    else:
        marker = "o" if len(series.steps) <= 20 else ""
        axes.plot(series.steps, series.values, color=series.color, linewidth=2.0, marker=marker, markersize=4)
