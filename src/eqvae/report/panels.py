"""Panels: small charts of one quantity each, over a run's steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import matplotlib
import numpy as np
from jaxtyping import Float64, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy import ndarray

from eqvae.report.charts import ACCENT, BASE, INK, PAPER_STYLE, SIZE_INCHES, STYLE, to_page_svg
from eqvae.report.tables import finite, with_minus_sign

MAX_POINTS = 1000
"""Of a line: panels are a few hundred pixels wide, and long runs log tens of thousands of steps."""


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


def training_panel(records: Sequence[dict], quantity: Quantity) -> Panel | None:
    """Draw what training steps logged: a series for each branch where they are told apart, as levels differ."""
    equivariance = [record for record in records if record.get("branch") == "equivariance"]
    plain = [record for record in records if record.get("branch", "equivariance") != "equivariance"]
    if quantity.is_noisy and equivariance and plain:
        candidates = [
            read_series(plain, quantity.key, "plain", BASE, quantity.is_noisy),
            read_series(equivariance, quantity.key, "equivariance", ACCENT, quantity.is_noisy),
        ]
    else:
        candidates = [read_series(records, quantity.key, "", ACCENT, quantity.is_noisy)]
    series = tuple(item for item in candidates if item is not None)
    if not any(item.values.any() for item in series):
        return None
    return Panel(title=quantity.title, summary=_summary(series[-1]), y_label=quantity.y_label, series=series)


def read_series(
    records: Sequence[dict], key: str, label: str = "", color: str = ACCENT, is_noisy: bool = False
) -> Series | None:
    """Pick the finite values of one key."""
    points = [(record["step"], value) for record in records if (value := finite(record.get(key))) is not None]
    if not points:
        return None
    steps, values = np.array(points, dtype=np.float64).T
    return Series(label=label, color=color, steps=steps, values=values, is_noisy=is_noisy)


def draw_panel(panel: Panel, id_prefix: str = "chart") -> str:
    """Draw a panel as an SVG element for use inside HTML."""
    with matplotlib.rc_context(STYLE):
        chart = Figure(figsize=SIZE_INCHES, layout="constrained")
        _draw_axes(chart.add_subplot(), panel)
        return to_page_svg(chart, id_prefix)


def draw_panels(panels: Sequence[Panel]) -> Figure:
    """Draw panels as one figure, for papers."""
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)
    with matplotlib.rc_context(PAPER_STYLE):
        chart = Figure(figsize=(num_columns * SIZE_INCHES[0], num_rows * (SIZE_INCHES[1] + 0.3)), layout="constrained")
        for axes, panel in zip(chart.subplots(num_rows, num_columns, squeeze=False).flat, panels, strict=False):
            _draw_axes(axes, panel)
            axes.set_title(panel.title, fontsize=10, loc="left")
        for axes in chart.axes[len(panels) :]:
            axes.remove()
    return chart


def smooth(values: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """Exponential moving average over about a tenth of the series, corrected for its start."""
    keep = 1.0 - 2.0 / (max(len(values) // 10, 1) + 1)
    total = weight = 0.0
    averages = np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        averages[index] = total / weight
    return averages


def short_number(value: float) -> str:
    """Print a value with three digits, thousands in full."""
    return with_minus_sign(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


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


def _summary(series: Series) -> str:
    """First and last average of a noisy series; the peak of a schedule, whose ends say little."""
    if not series.is_noisy:
        return f"peak {short_number(series.values.max())}"
    averages = smooth(series.values)
    return f"{short_number(averages[0])} → {short_number(averages[-1])}"


def _extremes(values: Float64[ndarray, " n"]) -> Int64[ndarray, " m"]:
    """Indices of what can be seen of a long noisy line: the least and the largest value of each short stretch."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), MAX_POINTS // 2 + 1).astype(np.int64)
    ends = [
        first + place
        for first, last in pairwise(edges)
        for place in (values[first:last].argmin(), values[first:last].argmax())
    ]
    return np.unique(np.array(ends, dtype=np.int64))


def _draw_series(axes: Axes, series: Series) -> None:
    if series.is_noisy:
        light, last = _extremes(series.values), len(series.values) - 1
        strong = np.unique(np.linspace(0, last, MAX_POINTS).astype(np.int64))
        axes.plot(series.steps[light], series.values[light], color=series.color, alpha=0.28, linewidth=0.9)
        axes.plot(series.steps[strong], smooth(series.values)[strong], color=series.color, linewidth=2.0)
    else:
        marker = "o" if len(series.steps) <= 20 else ""
        axes.plot(series.steps, series.values, color=series.color, linewidth=2.0, marker=marker, markersize=4)
