"""Figure 3 of arXiv:2502.09509: Frechet distance between tau(x) and D(tau(E(x))), as grouped bars."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eqvae.report.charts import (
    CARD_SIZE_INCHES,
    INK,
    LETTER_POINTS,
    PAPER_STYLE,
    STYLE,
    WIDE_SIZE_INCHES,
    add_legend,
    autoencoder_colors,
    to_page_svg,
)
from eqvae.report.columns import Distance, distances
from eqvae.report.folders import Evaluation, comparable_groups
from eqvae.report.tables import figure

GROUP_SHARE = 0.84
"""Of a group's place, what its bars fill."""

FULL_WIDTH_INCHES = 7.6
"""For bars that need a line of their own."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One autoencoder's figures."""

    name: str
    color: str

    values: tuple[float | None, ...]
    """One for each of the chart's groups; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class DistanceChart:
    """Bars of one or more autoencoders, in groups: one for each scale, one for the mean over rotations."""

    label: str
    """The distance, e.g. `rFID`."""

    is_fid: bool
    """Whether published figures may be set beside its own."""

    groups: tuple[str, ...]

    bars: tuple[Bars, ...]

    top: float
    """Where the axis ends; charts of one group of comparable autoencoders share it."""

    @property
    def short_label(self) -> str:
        """The distance without its features."""
        return self.label.partition(" ")[0]

    @property
    def summary(self) -> str:
        """All figures, for those who cannot see the chart."""
        return "; ".join(
            f"{group}: " + ", ".join(_sentence_part(bars, index) for bars in self.bars)
            for index, group in enumerate(self.groups)
        )

    @property
    def width_inches(self) -> float:
        """Wide enough for the bars' labels to stand beside each other."""
        longest = max(len(show_distance(value)) for bars in self.bars for value in bars.values if value is not None)
        bar = LETTER_POINTS * longest + 2.0
        needed = (bar * len(self.bars) * len(self.groups) / GROUP_SHARE + 45.0) / 72.0
        return WIDE_SIZE_INCHES[0] if needed <= 1.2 * WIDE_SIZE_INCHES[0] else max(needed, FULL_WIDTH_INCHES)

    @property
    def is_wide(self) -> bool:
        """Whether it needs a line of its own."""
        return self.width_inches > WIDE_SIZE_INCHES[0]

    def has(self, name: str) -> bool:
        """See whether an autoencoder is drawn."""
        return any(item.name == name for item in self.bars)

    def only(self, name: str) -> "DistanceChart":
        """Pick out one autoencoder."""
        bars = tuple(item for item in self.bars if item.name == name)
        return replace(self, bars=bars)


def distance_charts(evaluations: Sequence[Evaluation]) -> list[DistanceChart]:
    """Choose what to draw: one chart for each set of comparable evaluations and each kind of features."""
    charts = []
    colors = autoencoder_colors([item.name for item in evaluations])
    for members in comparable_groups(evaluations):
        for distance in distances(members, "r"):
            groups = _groups(members, distance)
            bars = tuple(
                Bars(
                    name=item.name,
                    color=colors[item.name],
                    values=tuple(figure(item, key) for key in groups.values()),
                )
                for item in members
                if any(figure(item, key) is not None for key in groups.values())
            )
            if bars:
                top = max(value for item in bars for value in item.values if value is not None)
                charts.append(
                    DistanceChart(
                        label=distance.label,
                        is_fid=distance.is_fid,
                        groups=tuple(groups),
                        bars=bars,
                        top=1.12 * top,
                    )
                )
    return charts


def show_distance(value: float) -> str:
    """Print a distance on its bar: rounded down as in the paper, but not to 0."""
    if value < 1e-4:
        return "0"
    exact = Decimal(str(value))
    step = Decimal(1) if value >= 10 else Decimal("0.1") if value >= 1 else Decimal(1).scaleb(exact.adjusted() - 1)
    return f"{exact.quantize(step, rounding=ROUND_FLOOR):f}"


def draw_distances(chart: DistanceChart, id_prefix: str, *, small: bool = False) -> str:
    """Draw the chart for the page."""
    size = CARD_SIZE_INCHES if small else (chart.width_inches, WIDE_SIZE_INCHES[1])
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=size, layout="constrained")
        axes = drawing.add_subplot()
        _draw_bars(axes, chart)
        if small:
            axes.set_yticks([])
            axes.set_ylabel("")
            axes.grid(visible=False)
            axes.set_xticks(range(len(chart.groups)), [group.replace(" ", "") for group in chart.groups], fontsize=8.5)
        return to_page_svg(drawing, id_prefix)


def distance_figure(chart: DistanceChart) -> Figure:
    """Draw the chart for a paper, with a legend."""
    with matplotlib.rc_context(PAPER_STYLE):
        drawing = Figure(figsize=(chart.width_inches, WIDE_SIZE_INCHES[1]), layout="constrained")
        axes = drawing.add_subplot()
        _draw_bars(axes, chart)
        if len(chart.bars) > 1:
            add_legend(drawing, axes)
    return drawing


def _groups(evaluations: Sequence[Evaluation], distance: Distance) -> dict[str, str]:
    """The groups' names and keys: scales from the mildest on, then the rotations' mean."""
    pattern = re.compile(re.escape(distance.key) + r"_scale_(\d+(?:\.\d+)?)")
    keys = dict.fromkeys(key for item in evaluations for key in item.metrics)
    scales = sorted(((float(match[1]), key) for key in keys if (match := pattern.fullmatch(key))), reverse=True)
    groups = {f"s = {scale:.2f}": key for scale, key in scales}
    rotation = f"{distance.key}_rotation"
    return groups | ({"R(θ)": rotation} if rotation in keys else {})


def _draw_bars(axes: Axes, chart: DistanceChart) -> None:
    width = GROUP_SHARE / len(chart.bars)
    for position, bars in enumerate(chart.bars):
        offset = (position - (len(chart.bars) - 1) / 2) * width
        places = [(index + offset, value) for index, value in enumerate(bars.values) if value is not None]
        centres, heights = zip(*((centre, max(value, 0.0)) for centre, value in places), strict=True)
        axes.bar(centres, heights, width=0.88 * width, color=bars.color, label=bars.name, zorder=2)
        for centre, value in places:
            axes.annotate(
                show_distance(value), (centre, max(value, 0.0)), xytext=(0, 2.5), textcoords="offset points",
                ha="center", va="bottom", fontsize=9, color=INK,
            )  # fmt: skip
    axes.set_xticks(range(len(chart.groups)), chart.groups)
    axes.tick_params(axis="x", length=0, pad=13)
    for name in axes.get_xticklabels():
        name.set_verticalalignment("baseline")  # their tops differ: those of brackets are higher
    axes.set_xlim(-0.5, len(chart.groups) - 0.5)
    axes.set_ylim(0.0, chart.top or 1.0)
    axes.set_ylabel(chart.label)
    axes.set_axisbelow(True)


def _sentence_part(bars: Bars, index: int) -> str:
    value = bars.values[index]
    return f"{bars.name} {'not measured' if value is None else show_distance(value)}"
