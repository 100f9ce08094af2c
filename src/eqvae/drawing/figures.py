"""A report's figures as files of their own, for papers and slides."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL.Image import Image

from eqvae.artifacts.files import write_atomically
from eqvae.drawing import comparison
from eqvae.drawing.charts import write_svg
from eqvae.drawing.comparison_charts import curves_figure, curves_rows
from eqvae.drawing.evaluation_charts import distance_charts, distance_figure, spectrum_charts, spectrum_figure
from eqvae.drawing.folders import Contents, read_folders
from eqvae.drawing.panels import Panel, draw_panels, run_panels, training_panels
from eqvae.drawing.pictures import (
    draw_grid,
    draw_stages,
    latent_map_grid,
    picture_groups,
    read_sheet,
    sample_sheet,
    stages,
    transform_grids,
)


@dataclass(frozen=True, kw_only=True)
class ChartFile:
    """A chart for a paper."""

    name: str
    """Of its files, without an ending."""

    figure: Figure

    rows: list[dict[str, Any]]
    """What is drawn: a row for each value, or for each place that has several."""

    def write(self, folder: Path) -> list[Path]:
        """Write it as SVG and PDF, and what is drawn as CSV; the same chart makes the same files."""
        writers: dict[str, Callable[[Path], object]] = {
            ".svg": partial(write_svg, self.figure), ".pdf": self._write_pdf, ".csv": self._write_csv
        }  # fmt: skip
        paths = [folder / f"{self.name}{ending}" for ending in writers]
        for path, write in zip(paths, writers.values(), strict=True):
            write_atomically(path, write)
        return paths

    def _write_pdf(self, path: Path) -> None:
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: journals refuse Type 3
            self.figure.savefig(path, format="pdf", metadata={"CreationDate": None})

    def _write_csv(self, path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def write_figures(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write latent maps (Figure 1), transformed decodings (Figures 2 and 6) and contact sheets as PNG, and the charts.

    Charts are Figure 3, the spectra, the runs' curves, and distances of training runs that were measured alike: SVG and
    PDF, with what is drawn as CSV. A run that has not logged anything yet has no curves and gets no file.
    """
    contents = read_folders(folders)
    written, taken = [], Counter[str]()
    for name, picture in _figure_pictures(contents):
        written.append(out / f"{_distinct(name, taken)}.png")
        write_atomically(written[-1], partial(picture.save, format="png"))
    for chart in _figure_charts(contents):
        written += replace(chart, name=_distinct(chart.name, taken)).write(out)
    return written


def _figure_pictures(contents: Contents) -> list[tuple[str, Image]]:
    pictures: list[tuple[str, Image]] = []
    groups = picture_groups(contents.evaluations)
    for number, group in enumerate(groups):
        suffix = f"_{number + 1}" if len(groups) > 1 else ""
        for grid in [latent_map_grid(group), *transform_grids(group)]:
            name = _file_name(grid.title.replace("°", "_degrees")) or "latent_maps"
            pictures.append((name + suffix, draw_grid(grid)))
    sheets = [item for item in contents.trainings if item.sheets]
    pictures += [(_file_name(f"stages_{item.name}"), draw_stages(stages(item))) for item in sheets]
    pictures += [(_file_name(f"samples_{item.name}"), read_sheet(sample_sheet(item))) for item in contents.sample_sets]
    return pictures


def _figure_charts(contents: Contents) -> list[ChartFile]:
    charts: list[ChartFile] = []
    for name, drawn in (
        ("figure3", [(distance_figure(chart), chart.rows) for chart in distance_charts(contents.evaluations)]),
        ("spectrum", [(spectrum_figure(chart), chart.rows) for chart in spectrum_charts(contents.evaluations)]),
        (
            "learning_curves",
            [
                (curves_figure(item, "images"), curves_rows(item))
                for item in comparison.shared_curves(contents.trainings)
            ],
        ),
    ):
        names = [name] if len(drawn) == 1 else [f"{name}_{number + 1}" for number in range(len(drawn))]
        charts += [
            ChartFile(name=own, figure=figure, rows=rows) for own, (figure, rows) in zip(names, drawn, strict=True)
        ]
    panels = [
        (f"curves_{run.name}", [panel for group in run_panels(run).values() for panel in group])
        for run in contents.runs
    ]
    panels += [(f"training_{training.name}", training_panels(training)) for training in contents.trainings]
    charts += [
        ChartFile(name=_file_name(name), figure=draw_panels(drawn), rows=_panels_rows(drawn))
        for name, drawn in panels
        if drawn
    ]
    return charts


def _panels_rows(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """What is drawn, for a table; averages are drawn of the same values."""
    return [
        {"panel": panel.title, "axis": panel.y_label, "branch": series.name, "step": int(step), "value": float(value)}
        for panel in panels
        for series in panel.series
        for step, value in zip(series.steps, series.values, strict=True)
    ]


def _distinct(name: str, taken: Counter[str]) -> str:
    """Number what has the name of another file, on file systems too for which large and small letters are one."""
    taken[name.casefold()] += 1
    count = taken[name.casefold()]
    return name if count == 1 else f"{name}_{count}"


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title).strip("_")
