"""Latents' power spectra beside the image's: the diagnosis of arXiv:2502.14831, drawn.

Natural images lose power towards fine detail. Latents that lose less carry detail that a diffusion model must draw from
noise, and that interpolation and scaling destroy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eqvae.report.charts import (
    CARD_SIZE_INCHES,
    INK,
    PAPER_STYLE,
    STYLE,
    WIDE_SIZE_INCHES,
    add_legend,
    autoencoder_colors,
    to_page_svg,
)
from eqvae.report.columns import SPECTRUM_EXCESS
from eqvae.report.folders import Evaluation, comparable_groups
from eqvae.report.spectrum import Spectrum
from eqvae.report.tables import figure

DASHES = (0, (4, 2.5))


@dataclass(frozen=True, kw_only=True)
class SpectrumLine:
    """One autoencoder's spectrum."""

    name: str
    color: str
    spectrum: Spectrum

    excess_db: float | None
    """None where the evaluation did not say."""


@dataclass(frozen=True, kw_only=True)
class SpectrumChart:
    """Spectra of one or more autoencoders, measured on the same images."""

    lines: tuple[SpectrumLine, ...]

    range_db: tuple[float, float]
    """Of the axis; charts of one group of comparable autoencoders share it."""

    @property
    def shares_image_spectrum(self) -> bool:
        """Whether one dashed line stands for the images: not where strides differ."""
        first, *others = (line.spectrum for line in self.lines)
        return all(
            first.image_db.shape == other.image_db.shape and np.allclose(first.image_db, other.image_db, atol=0.05)
            for other in others
        )

    @property
    def excess(self) -> str:
        """For the caption: `excess 7.3 dB`, of two autoencoders `excess 7.3 → 2.1 dB`; of more it would be too long."""
        known = [line.excess_db for line in self.lines if line.excess_db is not None]
        if len(known) < len(self.lines) or len(known) > 2:
            return ""
        return f"excess {' → '.join(SPECTRUM_EXCESS.show(value) for value in known)} dB"

    @property
    def summary(self) -> str:
        """The excess of each autoencoder, for those who cannot see the chart."""
        parts = [
            f"{line.name} {SPECTRUM_EXCESS.show(line.excess_db)} dB above the image at high frequencies"
            for line in self.lines
            if line.excess_db is not None
        ]
        return ", ".join(parts) or ", ".join(line.name for line in self.lines)

    def has(self, name: str) -> bool:
        """See whether an autoencoder is drawn."""
        return any(item.name == name for item in self.lines)

    def only(self, name: str) -> "SpectrumChart":
        """Pick out one autoencoder."""
        return replace(self, lines=tuple(line for line in self.lines if line.name == name))


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
                excess_db=figure(item, SPECTRUM_EXCESS.key),
            )
            for item in members
            if item.spectrum is not None
        )
        if lines:
            levels = np.concatenate([[*line.spectrum.latent_db, *line.spectrum.image_db] for line in lines])
            margin = 0.06 * (np.ptp(levels) or 1.0)
            charts.append(
                SpectrumChart(lines=lines, range_db=(float(levels.min() - margin), float(levels.max() + margin)))
            )
    return charts


def draw_spectra(chart: SpectrumChart, id_prefix: str, *, small: bool = False) -> str:
    """Draw the chart for the page."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=CARD_SIZE_INCHES if small else WIDE_SIZE_INCHES, layout="constrained")
        axes = drawing.add_subplot()
        _draw_lines(axes, chart)
        if small:
            axes.set_xticks([0.0, 0.25, 0.5], ["0", "0.25", "0.5"])
        return to_page_svg(drawing, id_prefix)


def spectrum_figure(chart: SpectrumChart) -> Figure:
    """Draw the chart for a paper, with a legend."""
    with matplotlib.rc_context(PAPER_STYLE):
        drawing = Figure(figsize=WIDE_SIZE_INCHES, layout="constrained")
        axes = drawing.add_subplot()
        _draw_lines(axes, chart)
        add_legend(drawing, axes)
    return drawing


def _draw_lines(axes: Axes, chart: SpectrumChart) -> None:
    shared = chart.shares_image_spectrum
    for line in chart.lines:
        spectrum = line.spectrum
        if len(chart.lines) == 1:
            axes.fill_between(
                spectrum.frequency, spectrum.image_db, spectrum.latent_db, spectrum.latent_db > spectrum.image_db,
                interpolate=True, color=line.color, alpha=0.14, linewidth=0,
            )  # fmt: skip
        axes.plot(spectrum.frequency, spectrum.latent_db, color=line.color, linewidth=2.0, label=line.name, zorder=4)
    for line in chart.lines[:1] if shared else chart.lines:
        axes.plot(
            line.spectrum.frequency, line.spectrum.image_db, color=INK if shared else line.color, linewidth=1.4,
            linestyle=DASHES, label="image" if shared else f"image, cells of {line.name}", zorder=3,
        )  # fmt: skip
    axes.set_xlim(0.0, 0.5)
    axes.set_ylim(*chart.range_db)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.set_xlabel("cycles per latent cell")
    axes.set_ylabel("power, dB")
