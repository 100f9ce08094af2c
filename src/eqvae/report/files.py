"""The report's figures as files of their own, for papers and slides."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL.Image import Image

from eqvae.artifacts import write_atomically
from eqvae.evidence.curves import draw_run, run_panels
from eqvae.evidence.shared_curves import shared_curves, shared_figure
from eqvae.report.contents import Contents, read_folders
from eqvae.report.distance_chart import distance_charts, distance_figure
from eqvae.report.figures import picture_groups
from eqvae.report.generator_panels import draw_training, training_panels
from eqvae.report.grids import draw_grid, latent_map_grid, transform_grids
from eqvae.report.sheets import draw_stages, read_sheet, sample_sheet, stages
from eqvae.report.spectrum_chart import spectrum_charts, spectrum_figure


def write_figures(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write latent maps (Figure 1), transformed decodings (Figures 2 and 6) and contact sheets as PNG, charts as SVG.

    Charts are Figure 3, the spectra, the runs' curves, and distances of training runs that were measured alike.
    A run that has not logged anything yet has no curves and gets no file.
    """
    contents = read_folders(folders)
    evaluations = contents.evaluations
    written: list[Path] = []
    groups = picture_groups(evaluations)
    for number, group in enumerate(groups):
        suffix = f"_{number + 1}" if len(groups) > 1 else ""
        for grid in [latent_map_grid(group), *transform_grids(group)]:
            name = _file_name(grid.title.replace("°", "_degrees")) or "latent_maps"
            path = out / f"{name}{suffix}.png"
            written.append(_write_png(draw_grid(grid), path))
    charts = [("figure3", [distance_figure(chart) for chart in distance_charts(evaluations)])]
    charts.append(("spectrum", [spectrum_figure(chart) for chart in spectrum_charts(evaluations)]))
    charts.append(("learning_curves", [shared_figure(item) for item in shared_curves(contents.trainings)]))
    for name, drawings in charts:
        for number, drawing in enumerate(drawings):
            suffix = f"_{number + 1}" if len(drawings) > 1 else ""
            written.append(_write_svg(drawing, out / f"{name}{suffix}.svg"))
    for run in contents.runs:
        if run_panels(run):
            written.append(_write_svg(draw_run(run), out / f"curves_{_file_name(run.name)}.svg"))
    return written + _write_generators(contents, out)


def _write_generators(contents: Contents, out: Path) -> list[Path]:
    written = []
    for training in contents.trainings:
        name = _file_name(training.name)
        if training_panels(training):
            written.append(_write_svg(draw_training(training), out / f"training_{name}.svg"))
        if training.sheets:
            written.append(_write_png(draw_stages(stages(training)), out / f"stages_{name}.png"))
    for samples in contents.sample_sets:
        path = out / f"samples_{_file_name(samples.name)}.png"
        written.append(_write_png(read_sheet(sample_sheet(samples)), path))
    return written


def _write_png(picture: Image, path: Path) -> Path:
    write_atomically(path, partial(picture.save, format="png"))
    return path


def _write_svg(drawing: Figure, path: Path) -> Path:
    write_atomically(path, partial(drawing.savefig, format="svg"))
    return path


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title).strip("_")
