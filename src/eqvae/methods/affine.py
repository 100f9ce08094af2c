"""Crop, flip, affine and perspective maps: KohakuBlueleaf/HakuLatent, `transform/spatial.py`."""

import functools
import math
from typing import ClassVar, Literal

import torch

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method
from eqvae.methods.warping import draw_matrix, project, warp


@method("affine")
class Affine(Pair):
    """`L(tau x, D(tau z))`, tau a crop, a mirror image, an affine or a perspective map.

    Reflected outside. An exactly equivariant autoencoder loses nothing by crops and mirror images, which move whole
    cells; strength = 0 with kinds=[affine] is Equation 1 up to rounding.
    """

    limits: ClassVar = {"strength": (0.0, 1.0), "min_crop": (0.0, 1.0)}

    p: float = 0.5
    kinds: tuple[Literal["crop", "flip", "affine", "perspective"], ...] = ("crop", "flip", "affine", "perspective")
    """One of them is drawn for each step."""
    min_crop: float = 0.5
    """Smallest side of a crop, as a share of the whole."""
    strength: float = 1.0
    """1: rotated by up to 30 degrees, scaled by 0.8 to 1.25, moved and sheared by up to a tenth."""

    def act(self, batch: Batch) -> Drawn:
        """Draw the kind and the map."""
        kind, u = batch.choose(self.kinds), torch.rand(6, generator=batch.generator)
        if kind == "crop":
            share = self.min_crop + (1.0 - self.min_crop) * u[0].item()
            cells = [math.ceil(share * side) for side in batch.latent_size]
            first = [int(u[i + 1] * (side - cells[i] + 1)) for i, side in enumerate(batch.latent_size)]

            def crop(x: torch.Tensor, stride: int) -> torch.Tensor:
                rows, columns = (slice(f * stride, (f + c) * stride) for f, c in zip(first, cells, strict=True))
                return x[..., rows, columns]

            image, latent = (functools.partial(crop, stride=stride) for stride in (batch.stride, 1))
            return Drawn(image=image, latent=latent, name=f"crop {cells[0]} x {cells[1]}")
        if kind == "flip":
            return Drawn(image=lambda x: x.flip(-1), latent=lambda z: z.flip(-1), name="mirrored")
        matrix = draw_matrix(self.strength * (2.0 * u - 1.0), is_perspective=kind == "perspective")

        def tau(x: torch.Tensor) -> torch.Tensor:
            return warp(x, project(matrix, x.shape[-2], x.shape[-1]))

        return Drawn(image=tau, latent=tau, name=kind)

    def smallest_side(self, latent_side: int) -> int:
        """See `Pair`."""
        return max(math.ceil(self.min_crop * latent_side), 1) if "crop" in self.kinds else latent_side
