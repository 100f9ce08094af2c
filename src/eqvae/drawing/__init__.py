"""Draw what earlier stages saved: latent maps, grids, curves, tables, and a page that holds them all.

This package reads artifacts only; it runs no autoencoder.
"""

from eqvae.drawing.figures import write_figures
from eqvae.drawing.folders import read_folders
from eqvae.drawing.page import write_report

__all__ = ["read_folders", "write_figures", "write_report"]
