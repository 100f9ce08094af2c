"""Charts that set autoencoders side by side: distances after transformations (Figure 3), and power spectra.

Figure 3 of arXiv:2502.09509 shows the Frechet distance between tau(x) and D(tau(E(x))), as grouped bars. Spectra stand
beside the image's, the diagnosis of arXiv:2502.14831: natural images lose power towards fine detail, and latents that
lose less carry detail that a diffusion model must draw from noise, and that interpolation and scaling destroy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal
from functools import partial
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eqvae.drawing.charts import (
    CARD_SIZE_INCHES,
    HATCHES,
    INK,
    LETTER_POINTS,
    WIDE_SIZE_INCHES,
    autoencoder_colors,
    in_legend,
    marks,
    page_chart,
    paper_chart,
)
from eqvae.drawing.folders import Evaluation, Spectrum
from eqvae.drawing.tables import SPECTRUM_EXCESS, Distance, comparable_groups, distances
from eqvae.evidence.curves import finite

GROUP_SHARE = 0.84
"""Of a group's place, what its bars fill."""

FULL_WIDTH_INCHES = 7.6
"""For bars that need a line of their own."""

DASHES = (0, (4, 2.5))


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One autoencoder's distances."""

    name: str
    color: str

    values: tuple[float | None, ...]
    """One for each of the chart's groups; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class SpectrumLine:
    """One autoencoder's spectrum."""

    name: str
    color: str
    spectrum: Spectrum

    excess_db: float | None
    """None where the evaluation did not say."""


@dataclass(frozen=True, kw_only=True)
class DistanceChart:
    """Bars in groups: one group for each scale, one for the mean over rotations."""

    entries: tuple[Bars, ...]
    """One for each autoencoder."""

    distance: Distance
    groups: tuple[str, ...]

    top: float
    """Where the axis ends."""

    @property
    def summary(self) -> str:
        """All figures, for those who cannot see the chart."""
        return "; ".join(
            f"{group}: " + ", ".join(f"{bars.name} {show_distance(bars.values[index])}" for bars in self.entries)
            for index, group in enumerate(self.groups)
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is drawn, for a table."""
        return [
            {"transform": group, "autoencoder": bars.name, self.distance.key: value}
            for bars in self.entries
            for group, value in zip(self.groups, bars.values, strict=True)
        ]

    @property
    def width_inches(self) -> float:
        """Wide enough for the bars' labels to stand beside each other."""
        longest = max(len(show_distance(value)) for bars in self.entries for value in bars.values if value is not None)
        bar = LETTER_POINTS * longest + 2.0
        needed = (bar * len(self.entries) * len(self.groups) / GROUP_SHARE + 45.0) / 72.0
        return WIDE_SIZE_INCHES[0] if needed <= 1.2 * WIDE_SIZE_INCHES[0] else max(needed, FULL_WIDTH_INCHES)

    @property
    def is_wide(self) -> bool:
        """Whether it needs a line of its own."""
        return self.width_inches > WIDE_SIZE_INCHES[0]


@dataclass(frozen=True, kw_only=True)
class SpectrumChart:
    """Spectra, measured on the same images."""

    entries: tuple[SpectrumLine, ...]
    """One for each autoencoder."""

    range_db: tuple[float, float]
    """Of the axis."""

    @property
    def shares_image_spectrum(self) -> bool:
        """Whether one dashed line stands for the images: not where strides differ."""
        first, *others = (line.spectrum for line in self.entries)
        return all(
            first.image_db.shape == other.image_db.shape and np.allclose(first.image_db, other.image_db, atol=0.05)
            for other in others
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is drawn, for a table."""
        return [
            {"autoencoder": line.name, "cycles_per_cell": frequency, "latent_db": latent_db, "image_db": image_db}
            for line in self.entries
            for frequency, latent_db, image_db in zip(
                line.spectrum.frequency.tolist(),
                line.spectrum.latent_db.tolist(),
                line.spectrum.image_db.tolist(),
                strict=True,
            )
        ]

    @property
    def excess(self) -> str:
        """For the caption: `excess 7.3 dB`, of two autoencoders `excess 7.3 → 2.1 dB`; of more it would be too long."""
        known = [line.excess_db for line in self.entries if line.excess_db is not None]
        if len(known) < len(self.entries) or len(known) > 2:
            return ""
        return f"excess {' → '.join(map(SPECTRUM_EXCESS.show, known))} dB"


def distance_charts(evaluations: Sequence[Evaluation]) -> list[DistanceChart]:
    """Choose what to draw: one chart for each set of comparable evaluations and each kind of features."""
    charts = []
    colors = autoencoder_colors([item.name for item in evaluations])
    for members in comparable_groups(evaluations):
        for distance in distances(members, "r"):
            groups = _groups(members, distance)
            values = {item.name: tuple(finite(item.metrics.get(key)) for key in groups.values()) for item in members}
            bars = tuple(
                Bars(name=name, color=colors[name], values=of_one)
                for name, of_one in values.items()
                if any(value is not None for value in of_one)
            )
            if bars:
                top = 1.12 * max(value for item in bars for value in item.values if value is not None)
                charts.append(DistanceChart(distance=distance, groups=tuple(groups), entries=bars, top=top))
    return charts


def spectrum_charts(evaluations: Sequence[Evaluation]) -> list[SpectrumChart]:
    """Choose what to draw: one chart for each set of comparable evaluations."""
    charts = []
    colors = autoencoder_colors([item.name for item in evaluations])
    for members in comparable_groups(evaluations):
        lines = tuple(
            SpectrumLine(
                name=item.name,
                color=colors[item.name],
                spectrum=item.spectrum,
                excess_db=SPECTRUM_EXCESS.of(item.metrics),
            )
            for item in members
            if item.spectrum is not None
        )
        if lines:
            charts.append(spectrum_chart(lines))
    return charts


def spectrum_chart(lines: tuple[SpectrumLine, ...]) -> SpectrumChart:
    """Draw spectra on one axis that holds them all."""
    levels = np.concatenate([[*line.spectrum.latent_db, *line.spectrum.image_db] for line in lines])
    margin = 0.06 * (np.ptp(levels) or 1.0)
    return SpectrumChart(entries=lines, range_db=(float(levels.min() - margin), float(levels.max() + margin)))


Chart = TypeVar("Chart", DistanceChart, SpectrumChart)


def charts_of_one(charts: Sequence[Chart], name: str) -> list[Chart]:
    """Pick out one autoencoder; its charts keep the scale that they share with the others'."""
    alone = [(chart, tuple(item for item in chart.entries if item.name == name)) for chart in charts]
    return [replace(chart, entries=entries) for chart, entries in alone if entries]


def show_distance(value: float | None) -> str:
    """Print a distance on its bar: rounded down as in the paper, but not to 0."""
    if value is None:
        return "not measured"
    if value < 1e-4:
        return "0"
    exact = Decimal(str(value))
    step = Decimal(1) if value >= 10 else Decimal("0.1") if value >= 1 else Decimal(1).scaleb(exact.adjusted() - 1)
    return f"{exact.quantize(step, rounding=ROUND_FLOOR):f}"


def draw_distances(chart: DistanceChart, id_prefix: str, *, small: bool = False) -> str:
    """Draw the chart for the page."""
    size = CARD_SIZE_INCHES if small else (chart.width_inches, WIDE_SIZE_INCHES[1])
    return page_chart(partial(_draw_bars, chart, small), size, id_prefix)


def distance_figure(chart: DistanceChart) -> Figure:
    """Draw the chart for a paper, with a legend."""
    size = (chart.width_inches, WIDE_SIZE_INCHES[1])
    return paper_chart(partial(_draw_bars, chart, False), size, has_legend=len(chart.entries) > 1)


def draw_spectra(chart: SpectrumChart, id_prefix: str, *, small: bool = False) -> str:
    """Draw the chart for the page."""
    return page_chart(partial(_draw_lines, chart, small), CARD_SIZE_INCHES if small else WIDE_SIZE_INCHES, id_prefix)


def spectrum_figure(chart: SpectrumChart) -> Figure:
    """Draw the chart for a paper, with a legend."""
    return paper_chart(partial(_draw_lines, chart, False), WIDE_SIZE_INCHES)


def _groups(evaluations: Sequence[Evaluation], distance: Distance) -> dict[str, str]:
    """The groups' names and keys: scales from the mildest on, then the rotations' mean."""
    pattern = re.compile(re.escape(distance.key) + r"_scale_(\d+(?:\.\d+)?)")
    keys = dict.fromkeys(key for item in evaluations for key in item.metrics)
    scales = sorted(((float(match[1]), key) for key in keys if (match := pattern.fullmatch(key))), reverse=True)
    groups = {f"s = {scale:.2f}": key for scale, key in scales}
    rotation = f"{distance.key}_rotation"
    return groups | ({"R(θ)": rotation} if rotation in keys else {})


def _draw_bars(chart: DistanceChart, small: bool, axes: Axes) -> None:
    width = GROUP_SHARE / len(chart.entries)
    for position, bars in enumerate(chart.entries):
        offset = (position - (len(chart.entries) - 1) / 2) * width
        places = [(index + offset, value) for index, value in enumerate(bars.values) if value is not None]
        centres, heights = zip(*((centre, max(value, 0.0)) for centre, value in places), strict=True)
        axes.bar(
            centres, heights, width=0.88 * width, facecolor=bars.color, edgecolor="white", linewidth=0.0,
            hatch=HATCHES[bars.color], label=in_legend(bars.name), zorder=2,
        )  # fmt: skip
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
    axes.set_ylabel(chart.distance.label)
    axes.set_axisbelow(True)
    if small:
        axes.set_yticks([])
        axes.set_ylabel("")
        axes.grid(visible=False)
        axes.set_xticks(range(len(chart.groups)), [group.replace(" ", "") for group in chart.groups], fontsize=8.5)


def _draw_lines(chart: SpectrumChart, small: bool, axes: Axes) -> None:
    shared = chart.shares_image_spectrum
    for line in chart.entries:
        spectrum = line.spectrum
        if len(chart.entries) == 1:
            axes.fill_between(
                spectrum.frequency, spectrum.image_db, spectrum.latent_db, spectrum.latent_db > spectrum.image_db,
                interpolate=True, color=line.color, alpha=0.14, linewidth=0,
            )  # fmt: skip
        look = marks(line.color, len(spectrum.frequency))
        axes.plot(spectrum.frequency, spectrum.latent_db, **look, linewidth=2.0, label=in_legend(line.name), zorder=4)
    for line in chart.entries[:1] if shared else chart.entries:
        axes.plot(
            line.spectrum.frequency, line.spectrum.image_db, color=INK if shared else line.color, linewidth=1.4,
            linestyle=DASHES, label=in_legend("image" if shared else f"image, cells of {line.name}"), zorder=3,
        )  # fmt: skip
    axes.set_xlim(0.0, 0.5)
    axes.set_ylim(*chart.range_db)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.set_xlabel("cycles per latent cell")
    axes.set_ylabel("power, dB")
    if small:
        axes.set_xticks([0.0, 0.25, 0.5], ["0", "0.25", "0.5"])
