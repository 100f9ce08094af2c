"""The report's figures as files of their own, for papers and slides."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from eqvae.artifacts import write_atomically
from eqvae.report.curves import draw_run, run_panels
from eqvae.report.distance_chart import distance_charts, distance_figure
from eqvae.report.figures import picture_groups
from eqvae.report.folders import read_folders
from eqvae.report.grids import draw_grid, latent_map_grid, transform_grids
from eqvae.report.spectrum_chart import spectrum_charts, spectrum_figure


def write_figures(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write latent maps (Figure 1) and transformed decodings (Figures 2 and 6) as PNG, all charts as SVG.

    Charts are Figure 3, the spectra and the runs' curves.
    A run that has not logged anything yet has no curves and gets no file.

    Args:
        folders: As for `write_report`.
        out: The folder to write into; made where it is missing.

    Returns:
        The files.

    Raises:
        UserError: If a folder is missing, unfinished or of another kind.
    """
    evaluations, runs = read_folders(folders)
    written: list[Path] = []
    groups = picture_groups(evaluations)
    for number, group in enumerate(groups):
        suffix = f"_{number + 1}" if len(groups) > 1 else ""
        for grid in [latent_map_grid(group), *transform_grids(group)]:
            name = _file_name(grid.title.replace("°", "_degrees")) or "latent_maps"
            path = out / f"{name}{suffix}.png"
            picture = draw_grid(grid)
            write_atomically(path, partial(picture.save, format="png"))
            written.append(path)
    charts = [("figure3", [distance_figure(chart) for chart in distance_charts(evaluations)])]
    charts.append(("spectrum", [spectrum_figure(chart) for chart in spectrum_charts(evaluations)]))
    for name, drawings in charts:
        for number, drawing in enumerate(drawings):
            suffix = f"_{number + 1}" if len(drawings) > 1 else ""
            written.append(_write_svg(drawing, out / f"{name}{suffix}.svg"))
    for run in runs:
        if not run_panels(run):
            continue
        written.append(_write_svg(draw_run(run), out / f"curves_{_file_name(run.name)}.svg"))
    return written


def _write_svg(drawing: Figure, path: Path) -> Path:
    write_atomically(path, partial(drawing.savefig, format="svg"))
    return path


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title).strip("_")
