"""Draw what earlier stages saved: latent maps, grids, curves, tables, and a page that holds them all.

This package reads artifacts only; it runs no autoencoder.
"""

from eqvae.evidence.curves import run_panels
from eqvae.report.cards import Overview, overview
from eqvae.report.contents import Contents, read_folders
from eqvae.report.distance_chart import DistanceChart, distance_charts, draw_distances
from eqvae.report.files import write_figures
from eqvae.report.folders import Evaluation, Run
from eqvae.report.generators import SampleSet, Score, Training
from eqvae.report.grids import Grid, draw_grid, latent_map_grid, to_png, transform_grids
from eqvae.report.html import render_report, write_report
from eqvae.report.latent_maps import latent_maps
from eqvae.report.panels import draw_panel
from eqvae.report.spectrum_chart import SpectrumChart, draw_spectra, spectrum_charts
from eqvae.report.tables import Table, comparison_table

__all__ = [
    "Contents",
    "DistanceChart",
    "Evaluation",
    "Grid",
    "Overview",
    "Run",
    "SampleSet",
    "Score",
    "SpectrumChart",
    "Table",
    "Training",
    "comparison_table",
    "distance_charts",
    "draw_distances",
    "draw_grid",
    "draw_panel",
    "draw_spectra",
    "latent_map_grid",
    "latent_maps",
    "overview",
    "read_folders",
    "render_report",
    "run_panels",
    "spectrum_charts",
    "to_png",
    "transform_grids",
    "write_figures",
    "write_report",
]
