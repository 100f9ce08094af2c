"""The report's figures as files of their own, for papers and slides."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eqvae.artifacts import write_atomically
from eqvae.report.curves import draw_run
from eqvae.report.figures import picture_groups
from eqvae.report.folders import read_folders
from eqvae.report.grids import draw_grid, latent_map_grid, transform_grids


def write_figures(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write latent maps (Figure 1) and transformed decodings (Figures 2 and 6) as PNG, curves of runs as SVG.

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
            name = re.sub(r"[^\w.]+", "_", grid.title.replace("°", "_degrees")).strip("_") or "latent_maps"
            path = out / f"{name}{suffix}.png"
            picture = draw_grid(grid)
            write_atomically(path, partial(picture.save, format="png"))
            written.append(path)
    for run in runs:
        path = out / f"curves_{run.name}.svg"
        chart = draw_run(run)
        write_atomically(path, partial(chart.savefig, format="svg"))
        written.append(path)
    return written
