"""The power spectrum that an evaluation saved: how fast do latents change from cell to cell, against the image?"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from eqvae.artifacts import read_json
from eqvae.errors import UserError

KEYS = ("frequency", "latent_power", "image_power")


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Radially averaged power of latents, and of the images at the latents' resolution.

    Both are standardized: white noise has power 1 at every frequency.
    """

    frequency: Float64[ndarray, " n"]
    """Cycles per latent cell, rising, in (0, 0.5]."""

    latent_power: Float64[ndarray, " n"]
    """Above 0."""

    image_power: Float64[ndarray, " n"]
    """Above 0."""

    @property
    def latent_db(self) -> Float64[ndarray, " n"]:
        """The latents' power; 0 dB is white noise of their own variance."""
        return 10.0 * np.log10(self.latent_power)

    @property
    def image_db(self) -> Float64[ndarray, " n"]:
        """The images' power; 0 dB is white noise of their own variance."""
        return 10.0 * np.log10(self.image_power)

    @classmethod
    def read(cls, path: Path) -> "Spectrum":
        """Read what `eqvae evaluate --all` wrote."""
        content = read_json(path)
        try:
            curves = np.array([content[key] for key in KEYS], dtype=np.float64)
        except (KeyError, TypeError, ValueError):
            curves = np.empty(0)
        curves = curves[:, (curves > 0).all(0)] if curves.ndim == 2 and np.isfinite(curves).all() else np.empty((3, 0))
        if not curves.size:
            raise UserError(f"'{path}' holds no power spectrum", "Run 'eqvae evaluate' again")
        frequency, latent_power, image_power = curves
        return cls(frequency=frequency, latent_power=latent_power, image_power=image_power)
