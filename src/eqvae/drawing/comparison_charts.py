"""Charts of a comparison of training runs: quality against images and time, speed-up against quality."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from eqvae.drawing.charts import (
    INK,
    PAPER_STYLE,
    add_legend,
    autoencoder_colors,
    in_legend,
    marks,
    page_chart,
    paper_chart,
)
from eqvae.drawing.tables import MISSING
from eqvae.evidence.arms import ArmComparison, RunComparison
from eqvae.evidence.speed_up import SeedCurves, SpeedUp

TIMES = "\N{MULTIPLICATION SIGN}"

Axis = Literal["images", "time"]

CURVES_SIZE_INCHES = (4.6, 3.1)
CURVES_PAGE_SIZE_INCHES = (3.9, 2.75)
SPEED_UP_SIZE_INCHES = (6.6, 2.7)

MARKS = {"exact": "", "at_least": "≥ ", "at_most": "≤ ", "unknown": ""}

TRIANGLES = {"at_least": "^", "at_most": "v"}
"""For bounds; they point to where the true speed-up lies."""

TICKS = (
    (0.25, 0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10),
    (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
    (0.001, 0.01, 0.1, 1, 10, 100, 1000),
)
"""Ratios at which an axis may be labelled: the first row that gives no more than `MAX_TICKS` is taken."""

MAX_TICKS = 7

ROOM_FOR_ARROW = 0.24
"""Below the curves, as a share of their range."""


class TimeUnit(NamedTuple):
    """In which a comparison prints its times."""

    seconds: float
    name: str
    symbol: str


TIME_UNITS = (TimeUnit(3600.0, "hours", "h"), TimeUnit(60.0, "minutes", "min"), TimeUnit(1.0, "seconds", "s"))


def time_unit(comparison: RunComparison) -> TimeUnit:
    """Choose the largest unit of which the longest run has at least two."""
    longest = max(float(run.training_sec[-1]) for arm in comparison.arms for run in arm.runs)
    return next((unit for unit in TIME_UNITS if longest >= 2 * unit.seconds), TIME_UNITS[-1])


def quality_label(comparison: RunComparison) -> str:
    """Name the distance: `FID`, or `FD (efficientnet-lite0)`."""
    measure = comparison.measure
    return "FID" if measure["metric"] == "fid" else f"FD ({measure['features']})"


def show_ratio(value: float) -> str:
    """Print a ratio with three digits."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show_speed_up(found: SpeedUp) -> str:
    """Print a speed-up."""
    return MISSING if found.bound == "unknown" else f"{MARKS[found.bound]}{show_ratio(found.ratio)}"


def curves_figure(comparison: RunComparison, axis: Axis) -> Figure:
    """Draw quality against images seen or against training time, for a paper."""
    return paper_chart(partial(_draw_curves, comparison, axis), CURVES_SIZE_INCHES)


def curves_rows(comparison: RunComparison) -> list[dict[str, Any]]:
    """What is drawn of the curves, for a table."""
    return [
        {
            "arm": arm.name,
            "seed": run.seed,
            "images": int(num_images),
            "training_sec": float(training_sec),
            comparison.measure["metric"]: float(value),
        }
        for arm in comparison.arms
        for run in arm.runs
        for num_images, training_sec, value in zip(run.num_images, run.training_sec, run.values, strict=True)
    ]


def draw_curves(comparison: RunComparison, id_prefix: str) -> str:
    """Draw quality against images seen for the page, whose legend is the page's."""
    return page_chart(partial(_draw_curves, comparison, "images"), CURVES_PAGE_SIZE_INCHES, id_prefix)


def speed_up_figure(comparison: RunComparison) -> Figure:
    """Draw the speed-up against the quality level, in images and in training time."""
    colors = autoencoder_colors([arm.name for arm in comparison.arms])
    with matplotlib.rc_context(PAPER_STYLE):
        chart = Figure(figsize=SPEED_UP_SIZE_INCHES, layout="constrained")
        panels = chart.subplots(1, 2, sharey=True, sharex=True)
        for axes, name in zip(panels, ("images", "training time"), strict=True):
            for item in comparison.comparisons:
                found = item.levels_in_images if name == "images" else item.levels_in_time
                _draw_speed_ups(axes, found, colors[item.arm], item.arm if name == "images" else None)
            axes.axhline(1.0, color=INK, linewidth=1.0, zorder=2)
            axes.set_title(f"in {name}", fontsize=10, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        panels[0].invert_xaxis()
        chart.supxlabel(f"{quality_label(comparison)} reached (better to the right)", fontsize=9, color=INK)
        panels[0].set_ylabel("times as fast as the base")
        _scale_ratios(panels[0], comparison.comparisons)
        add_legend(chart, panels[0])
    return chart


def _draw_curves(comparison: RunComparison, axis: Axis, axes: Axes) -> None:
    unit = time_unit(comparison)
    scale = 1.0 if axis == "images" else unit.seconds
    colors = autoencoder_colors([arm.name for arm in comparison.arms])
    for arm in comparison.arms:
        _draw_arm(axes, arm.by_images() if axis == "images" else arm.by_time(), scale, arm.name, colors[arm.name])
    found = None
    if len(comparison.comparisons) == 1:
        (only,) = comparison.comparisons
        found = only.in_images if axis == "images" else only.in_time
    is_marked = found is not None and found.bound in ("exact", "at_least") and abs(np.log(found.ratio)) > 0.02
    _limit_quality(axes, comparison, ROOM_FOR_ARROW if is_marked else 0.06)
    if found is not None and is_marked:
        _mark_speed_up(axes, found, scale)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("images seen in training" if axis == "images" else f"training time, {unit.name}")
    axes.set_ylabel(quality_label(comparison))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if axis == "images":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_arm(axes: Axes, curves: SeedCurves, scale: float, name: str, color: str) -> None:
    mean = curves.mean()
    positions, values = mean.positions[0] / scale, mean.values[0]
    if len(curves.seeds) > 1:
        least, most = curves.values.min(axis=0), curves.values.max(axis=0)
        axes.fill_between(positions, least, most, color=color, alpha=0.14, linewidth=0)
        for own_positions, own_values in zip(curves.positions / scale, curves.values, strict=True):
            axes.plot(own_positions, own_values, color=color, alpha=0.45, linewidth=0.7)
    axes.plot(positions, values, **marks(color, len(positions)), linewidth=2.0, label=in_legend(name), zorder=4)


def _mark_speed_up(axes: Axes, found: SpeedUp, scale: float) -> None:
    """Drop lines from where both curves reach the quality, and the ratio between them, below the curves."""
    start, end = found.base_at / scale, found.arm_at / scale
    bottom, top = axes.get_ylim()
    foot = bottom + 0.05 * (top - bottom)
    axes.plot(
        [start, start, end, end], [foot, found.level, found.level, foot], color=INK, linewidth=1.0,
        linestyle=(0, (1, 1.6)), zorder=2,
    )  # fmt: skip
    axes.annotate(
        "", (end, foot), (start, foot), zorder=5,
        arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    axes.annotate(
        f"{show_speed_up(found)}{TIMES}", ((start + end) / 2, foot), xytext=(0, 2), textcoords="offset points",
        ha="center", va="bottom", fontsize=9.5, color=INK, fontweight="bold", zorder=6,
    )  # fmt: skip


def _draw_speed_ups(axes: Axes, found: Sequence[SpeedUp], color: str, label: str | None) -> None:
    """Bounds are no measurements: open triangles without a line."""
    exact = [entry for entry in found if entry.bound == "exact"]
    levels = [entry.level for entry in exact]
    if any(entry.interval is not None for entry in exact):
        low = [entry.interval.low or 1e-6 if entry.interval else np.nan for entry in exact]
        high = [entry.interval.high or 1e6 if entry.interval else np.nan for entry in exact]
        axes.fill_between(levels, low, high, color=color, alpha=0.14, linewidth=0)
    axes.plot(
        levels, [entry.ratio for entry in exact], **marks(color, len(levels)), linewidth=2.0,
        label=None if label is None else in_legend(label), zorder=4,
    )  # fmt: skip
    for bound, marker in TRIANGLES.items():
        marked = [entry for entry in found if entry.bound == bound]
        axes.plot(
            [entry.level for entry in marked], [entry.ratio for entry in marked], color=color, linestyle="",
            marker=marker, markersize=4.5, markerfacecolor="none", markeredgewidth=0.9, zorder=3,
        )  # fmt: skip


def _scale_ratios(axes: Axes, comparisons: Sequence[ArmComparison]) -> None:
    """Equal factors take equal room; the limits follow the ratios, and their bands as far as these are no wider."""
    entries = [entry for item in comparisons for entry in (*item.levels_in_images, *item.levels_in_time)]
    ratios = [entry.ratio for entry in entries if entry.bound != "unknown"] + [1.0]
    ends = [end for entry in entries if entry.interval for end in (entry.interval.low, entry.interval.high) if end]
    low, high = min(ratios), max(ratios)
    room = max(high / low, 1.25)
    low = max(min([low, *ends]), low / room) / 1.08
    high = min(max([high, *ends]), high * room) * 1.08
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    rows = [[tick for tick in row if low <= tick <= high] for row in TICKS]
    axes.yaxis.set_major_locator(FixedLocator(next((row for row in rows if len(row) <= MAX_TICKS), rows[-1])))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _limit_quality(axes: Axes, comparison: RunComparison, room_below: float) -> None:
    values = np.concatenate([arm.by_images().values.ravel() for arm in comparison.arms])
    extent = float(np.ptp(values)) or 1.0
    low, high = float(values.min()) - room_below * extent, float(values.max()) + 0.06 * extent
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(max(low, 0.0), high)
    axes.set_yticks([tick for tick in ticks if max(low, 0.0) <= tick <= high])
    axes.set_ylim(low, high)
