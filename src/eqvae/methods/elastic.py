"""Smooth random deformations: the non-linear transformations that EQ-VAE's authors leave to others."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method
from eqvae.methods.warping import is_inside, places, warp


@method("elastic")
class Elastic(Pair):
    """`L(tau x, D(tau z))`, tau a smooth random displacement of places; what comes from outside does not count.

    The field is drawn on a coarse grid and interpolated bicubically, at the image's resolution and at the latent's:
    displacements are the same in parts of the frame. amplitude = 0 is Equation 1 up to rounding.
    """

    limits: ClassVar = {"amplitude": (0.0, 1.0), "points": (2, 64)}

    p: float = 0.5
    amplitude: float = 0.05
    """Standard deviation of displacements, as a share of the side."""
    points: int = 4
    """Places of the coarse grid along a side."""

    def act(self, batch: Batch) -> Drawn:
        """Draw the displacements."""
        coarse = 2.0 * self.amplitude * torch.randn(1, 2, self.points, self.points, generator=batch.generator)

        def grid(height: int, width: int) -> torch.Tensor:
            field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
            return places(height, width) + field.permute(0, 2, 3, 1)

        def tau(x: torch.Tensor) -> torch.Tensor:
            return warp(x, grid(x.shape[-2], x.shape[-1]))

        mask = is_inside(grid(*batch.latent_size), batch.stride).to(batch.x.device)
        return Drawn(image=tau, latent=tau, mask=mask, name="elastic")
