"""How the paper's figures are laid out and written: points over epochs, sheets of samples, grids of transforms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from eqvae.artifacts.files import write_atomically
from eqvae.drawing.charts import ACCENT, INK, PAPER_STYLE, SIZE_INCHES
from eqvae.drawing.lettering import lettering
from eqvae.drawing.pictures import Grid, draw_grid
from eqvae.images import open_picture

_DPI = 200
_MIN_CELL_PX = 160
"""Smaller pictures are enlarged pixel by pixel, so that the columns' names fit above them."""


def draw_points(points: Mapping[float, Sequence[float]], paper: Mapping[float, float], y_label: str) -> Figure:
    """Draw means over seeds with all seeds behind them, and the paper's figures (Figure 5)."""
    with matplotlib.rc_context(PAPER_STYLE):
        chart = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = chart.add_subplot()
        kept = {x: values for x, values in points.items() if values}
        means = [sum(values) / len(values) for values in kept.values()]
        axes.plot(list(kept), means, color=ACCENT, linewidth=2.0, marker="o", markersize=4)
        for x, values in kept.items():
            axes.plot([x] * len(values), values, "_", color=ACCENT, alpha=0.5)
        if paper:
            axes.plot(list(paper), list(paper.values()), "D", color=INK, markersize=4, label="paper")
            axes.legend(frameon=False, fontsize=9)
        axes.set_xlabel("epochs of fine-tuning")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(y=0.15)
    return chart


def draw_trades(panels: Mapping[str, Mapping[str, tuple[float, float]]], x_label: str) -> Figure:
    """Draw named points, a panel for each measure."""
    with matplotlib.rc_context(PAPER_STYLE):
        num_panels, (width, height) = max(len(panels), 1), SIZE_INCHES
        chart = Figure(figsize=(width * num_panels, height * 1.4), layout="constrained")
        drawn = chart.subplots(1, num_panels, squeeze=False).flat
        for axes, (title, points) in zip(drawn, panels.items(), strict=False):
            for number, (name, (x, y)) in enumerate(points.items(), start=1):
                axes.plot([x], [y], "o", color=ACCENT, markersize=5, label=f"{number} {name}")
                axes.annotate(str(number), (x, y), (4, 4), textcoords="offset points", color=INK, fontsize=9)
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel(x_label)
            axes.margins(0.15)
        handles, labels = chart.axes[0].get_legend_handles_labels()
        chart.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, handlelength=0.0,
            handletextpad=0.0, markerscale=0.0,
        )  # fmt: skip
    return chart


def draw_sheets(
    rows: Mapping[str, Sequence[Path]], titles: Sequence[str], *, cell_px: int, first: int, count: int
) -> Image.Image:
    """Cut the same pictures out of each row's contact sheets and lay them side by side (Figures 4 and 7)."""
    parts = [[_cut_out(sheet, cell_px, first, count) for sheet in sheets] for sheets in rows.values()]
    size, gap = 14, 10
    font = lettering(size)
    left = int(max(font.getlength(line) for name in rows for line in name.splitlines())) + 2 * gap
    widths = [max(own[column].width for own in parts) for column in range(len(titles))]
    heights = [max(part.height for part in own) for own in parts]
    top = size + 2 * gap
    page = Image.new("RGB", (left + sum(widths) + gap * len(widths), top + sum(heights) + gap * len(heights)), "white")
    draw = ImageDraw.Draw(page)
    y = top
    for name, own, height in zip(rows, parts, heights, strict=True):
        x = left
        draw.multiline_text((gap, y + height // 2), name, fill="#1d1d1f", font=font, anchor="lm")
        for part, width, title in zip(own, widths, titles, strict=True):
            if y == top:
                draw.text((x, gap), title, fill="#55555a", font=font)
            page.paste(part, (x, y))
            x += width + gap
        y += height + gap
    return page


def _cut_out(sheet: Path, cell_px: int, first: int, count: int) -> Image.Image:
    """Cut `count` rows and columns of pictures out of a contact sheet, or what it has of them, and enlarge them."""
    step, factor = cell_px + 2, max(_MIN_CELL_PX // (cell_px * count), 1)
    with open_picture(sheet) as picture:
        right, bottom = (min((first + count) * step + 2, side) for side in picture.size)
        part = picture.convert("RGB").crop(
            (min(first * step, right - step), min(first * step, bottom - step), right, bottom)
        )
    return part.resize((part.width * factor, part.height * factor), Image.Resampling.NEAREST)


def write_grid(grid: Grid, path: Path) -> Path:
    """Enlarge small pictures, draw and write a grid."""
    factor = -(-_MIN_CELL_PX // max(grid.cell_px))
    enlarged = tuple(
        replace(column, pictures=column.pictures.repeat_interleave(factor, -1).repeat_interleave(factor, -2))
        for column in grid.columns
    )
    return write_picture(draw_grid(replace(grid, columns=enlarged)), path)


def write_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture."""
    write_atomically(path, partial(picture.save, format="png"))
    return path


def write_chart(chart: Figure, path: Path, index: int = 0) -> list[Path]:
    """Write a chart as SVG and PNG."""
    files = [numbered(path.with_name(f"{path.name}.{suffix}"), index) for suffix in ("svg", "png")]
    for file in files:
        write_atomically(file, partial(chart.savefig, format=file.suffix.removeprefix("."), dpi=_DPI))
    return files


def numbered(path: Path, index: int) -> Path:
    """Name the further ones of several files."""
    return path if index == 0 else path.with_name(f"{path.stem}_{index + 1}{path.suffix}")
