"""Draw what earlier stages saved: latent maps, grids, curves, tables, and a page that holds them all.

This package reads artifacts only; it runs no autoencoder.
"""

from eqvae.report.curves import draw_panel, run_panels
from eqvae.report.files import write_figures
from eqvae.report.folders import Evaluation, Run, read_folders
from eqvae.report.grids import Grid, draw_grid, latent_map_grid, to_png, transform_grids
from eqvae.report.html import render_report, write_report
from eqvae.report.latent_maps import latent_maps
from eqvae.report.tables import Table, comparison_table

__all__ = [
    "Evaluation",
    "Grid",
    "Run",
    "Table",
    "comparison_table",
    "draw_grid",
    "draw_panel",
    "latent_map_grid",
    "latent_maps",
    "read_folders",
    "render_report",
    "run_panels",
    "to_png",
    "transform_grids",
    "write_figures",
    "write_report",
]
