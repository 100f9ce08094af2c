"""Drawing the paper's figures from finished runs: latent maps, transformed decodings, charts, sheets of samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from eqvae.artifacts import write_atomically
from eqvae.images import open_picture
from eqvae.paper.planned import PlannedRun
from eqvae.report import read_folders
from eqvae.report.charts import ACCENT, INK, PAPER_STYLE, SIZE_INCHES
from eqvae.report.evaluation_charts import distance_charts, distance_figure
from eqvae.report.pictures import Grid, draw_grid, latent_map_grid, picture_groups, transform_grids
from eqvae.runs.compare import CompareConfig, compare

_DPI = 200
_MIN_CELL_PX = 160
"""Smaller pictures are enlarged pixel by pixel, so that the columns' names fit above them."""


def draw_latent_maps(evaluations: Sequence[PlannedRun], path: Path) -> list[Path]:
    """Draw the top three principal components of latents (Figure 1)."""
    groups = picture_groups(read_folders([run.folder for run in evaluations])[0])
    return [_write_grid(latent_map_grid(group), _numbered(path, index)) for index, group in enumerate(groups)]


def draw_transforms(evaluations: Sequence[PlannedRun], folder: Path, *, only: str | None = None) -> list[Path]:
    """Draw x, D(E(tau x)), and D(tau E(x)) of each autoencoder (Figures 2 and 6)."""
    written = []
    for index, group in enumerate(picture_groups(read_folders([run.folder for run in evaluations])[0])):
        for grid in transform_grids(group):
            if only is None or grid.title == only:
                name = grid.title.replace("°", " degrees").replace(" = ", " ").replace(" ", "_")
                written.append(_write_grid(grid, _numbered(folder / f"{name}.png", index)))
    return written


def draw_distances(evaluations: Sequence[PlannedRun], path: Path) -> list[Path]:
    """Draw the distances between tau(x) and D(tau(E(x))) (Figure 3)."""
    charts = distance_charts(read_folders([run.folder for run in evaluations])[0])
    return [
        file for index, chart in enumerate(charts) for file in _write_chart(distance_figure(chart), path, index)
    ]  # fmt: skip


def draw_comparison(base: Sequence[PlannedRun], ours: Sequence[PlannedRun], folder: Path) -> list[Path]:
    """Compare learning curves as `eqvae compare` does: curves and the speed-up (Figure 1, right)."""
    compare(CompareConfig(runs=tuple(run.folder for run in (*base, *ours)), out=folder))
    return sorted(folder.glob("*.png"))


@dataclass(frozen=True, kw_only=True)
class Point:
    """Figures of several seeds at one place."""

    x: float
    values: tuple[float, ...]


def draw_points(
    points: Sequence[Point], path: Path, *, x_label: str, y_label: str, paper: dict[float, float] | None = None
) -> list[Path]:
    """Draw means with all seeds behind them."""
    with matplotlib.rc_context(PAPER_STYLE):
        chart = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = chart.add_subplot()
        kept = [point for point in points if point.values]
        means = [sum(point.values) / len(point.values) for point in kept]
        axes.plot([point.x for point in kept], means, color=ACCENT, linewidth=2.0, marker="o", markersize=4)
        for point in kept:
            axes.plot([point.x] * len(point.values), point.values, "_", color=ACCENT, alpha=0.5)
        if paper:
            axes.plot(list(paper), list(paper.values()), "D", color=INK, markersize=4, label="paper")
            axes.legend(frameon=False, fontsize=9)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(y=0.15)
    return _write_chart(chart, path, 0)


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """Contact sheets of one generator, from the same noise as those of the other rows."""

    name: str
    """In one or several lines."""

    sheets: tuple[Path, ...]


def draw_sheets(
    rows: Sequence[SheetRow], titles: Sequence[str], path: Path, *, cell_px: int, first: int, count: int
) -> list[Path]:
    """Cut the same pictures out of several contact sheets and lay them side by side (Figures 4 and 7)."""
    step, factor = cell_px + 2, max(_MIN_CELL_PX // (cell_px * count), 1)
    parts = []
    for row in rows:
        own = []
        for sheet in row.sheets:
            with open_picture(sheet) as picture:
                box = (first * step, first * step, (first + count) * step + 2, (first + count) * step + 2)
                limit = (min(box[2], picture.width), min(box[3], picture.height))
                part = picture.convert("RGB").crop((min(box[0], limit[0] - step), min(box[1], limit[1] - step), *limit))
            own.append(part.resize((part.width * factor, part.height * factor), Image.Resampling.NEAREST))
        parts.append(own)
    size, gap = 14, 10
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    left = int(max(font.getlength(line) for row in rows for line in row.name.splitlines())) + 2 * gap
    widths = [max(own[column].width for own in parts) for column in range(len(titles))]
    heights = [max(part.height for part in own) for own in parts]
    top = size + 2 * gap
    page = Image.new("RGB", (left + sum(widths) + gap * len(widths), top + sum(heights) + gap * len(heights)), "white")
    draw = ImageDraw.Draw(page)
    y = top
    for row, own, height in zip(rows, parts, heights, strict=True):
        x = left
        draw.multiline_text((gap, y + height // 2), row.name, fill="#1d1d1f", font=font, anchor="lm")
        for part, width, title in zip(own, widths, titles, strict=True):
            if y == top:
                draw.text((x, gap), title, fill="#55555a", font=font)
            page.paste(part, (x, y))
            x += width + gap
        y += height + gap
    write_atomically(path, partial(page.save, format="png"))
    return [path]


def _write_grid(grid: Grid, path: Path) -> Path:
    factor = -(-_MIN_CELL_PX // max(grid.cell_px))
    if factor > 1:
        grid = replace(
            grid,
            columns=tuple(
                replace(
                    column,
                    pictures=column.pictures.repeat_interleave(factor, -1).repeat_interleave(factor, -2),
                )
                for column in grid.columns
            ),
        )
    write_atomically(path, partial(draw_grid(grid).save, format="png"))
    return path


def _write_chart(chart: Figure, path: Path, index: int) -> list[Path]:
    written = []
    for suffix in ("svg", "png"):
        file = _numbered(path.with_name(f"{path.name}.{suffix}"), index)
        write_atomically(file, partial(chart.savefig, format=suffix, dpi=_DPI))
        written.append(file)
    return written


def _numbered(path: Path, index: int) -> Path:
    return path if index == 0 else path.with_name(f"{path.stem}_{index + 1}{path.suffix}")
