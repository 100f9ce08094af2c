"""What all charts share: their style, and SVG that takes its colours from the page, so that dark pages stay dark."""

import io
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ACCENT, BASE, INK, RULE = "#0b7a75", "#949499", "#55555a", "#e3e1dc"
OCHRE, VIOLET, BLUE, ROSE = "#efb445", "#2f1a7a", "#41b2f1", "#9f124b"
CSS_VARIABLES = {
    ACCENT: "--accent",
    BASE: "--base",
    INK: "--muted",
    RULE: "--rule",
    OCHRE: "--ochre",
    VIOLET: "--violet",
    BLUE: "--blue",
    ROSE: "--rose",
}
AUTOENCODER_COLORS = (BASE, ACCENT, OCHRE, VIOLET, BLUE, ROSE)
"""By the place in the report: the base first, then what it is compared with. They differ in lightness, so that grey
print tells them apart, and for colour-blind eyes (tests/drawing/test_palette.py has the distances)."""

MARKERS = dict(zip(AUTOENCODER_COLORS, "osDPX*", strict=True))
HATCHES = dict(zip(AUTOENCODER_COLORS, ("////", "", "....", "\\\\\\\\", "xxxx", "oooo"), strict=True))
"""What tells lines and bars of a colour apart where there is none."""

NUM_MARKS = 8
"""On a line with many points."""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "grid.color": RULE,
    "hatch.linewidth": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "eqvae",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
PAPER_STYLE = STYLE | {"figure.facecolor": "white"}
"""For files of their own, which cannot know what they will lie on."""

SIZE_INCHES = (3.5, 2.2)
"""252 points wide, less than any place on the page: 9-point letters come out at 10 pixels or more."""

LETTER_POINTS = 6.0
"""Width of a letter or digit of 9 points, on average."""

CARD_SIZE_INCHES = (2.35, 1.7)
"""For charts that share the width of a card."""

WIDE_SIZE_INCHES = (3.9, 2.35)
"""For charts that share the width of a desk's page, and fill that of a phone."""


def autoencoder_colors(names: Sequence[str]) -> dict[str, str]:
    """Choose the autoencoders' colours, the same in every chart of a report."""
    if len(names) == 1:
        return {names[0]: ACCENT}
    return dict(zip(names, cycle(AUTOENCODER_COLORS), strict=False))


def in_legend(name: str) -> str:
    """Write a name so that matplotlib leaves it as it is: no mathematics, and no `_` that hides it."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def add_legend(chart: Figure, axes: Axes) -> None:
    """Name above a chart what is drawn in it, in as many columns as there is room for; the figure grows by that."""
    names = axes.get_legend_handles_labels()[1]
    num_columns = max(int(chart.get_figwidth() * 72.0 / (LETTER_POINTS * max(map(len, names)) + 36.0)), 1)
    chart.set_figheight(chart.get_figheight() + 0.2 * -(-len(names) // num_columns))
    chart.legend(loc="outside upper left", ncols=num_columns, frameon=False, fontsize=9, handlelength=1.6)


def marks(color: str, num_points: int) -> dict[str, Any]:
    """Mark a line of this colour, at some of its points where there are many."""
    return {"color": color, "marker": MARKERS[color], "markersize": 4.5, "markevery": -(-num_points // NUM_MARKS)}


def to_css(color: str) -> str:
    """Name a colour as the page does."""
    return f"var({CSS_VARIABLES[color]}, {color})"


def page_chart(draw: Callable[[Axes], None], size_inches: tuple[float, float], id_prefix: str) -> str:
    """Draw a chart for the page, whose legend and colours are the page's."""
    with matplotlib.rc_context(STYLE):
        chart = Figure(figsize=size_inches, layout="constrained")
        draw(chart.add_subplot())
        buffer = io.StringIO()
        FigureCanvasSVG(chart).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'\bid="', f'id="{id_prefix}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{id_prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{id_prefix}-")
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    for color in CSS_VARIABLES:
        svg = svg.replace(color, to_css(color))
    return svg


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure with outlines for letters; the same figure makes the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "eqvae"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def paper_chart(draw: Callable[[Axes], None], size_inches: tuple[float, float], *, has_legend: bool = True) -> Figure:
    """Draw a chart for a file of its own."""
    with matplotlib.rc_context(PAPER_STYLE):
        chart = Figure(figsize=size_inches, layout="constrained")
        axes = chart.add_subplot()
        draw(axes)
        if has_legend:
            add_legend(chart, axes)
    return chart
