"""Two views of a scene: the viewpoint transformations that EQ-VAE's authors leave to others."""

from pathlib import Path
from typing import ClassVar

import torch

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.images.sizes import ImageSize
from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method
from eqvae.methods.views import check_views, read_views
from eqvae.methods.warping import is_inside, project, warp


@method("viewpoint")
class Viewpoint(Pair):
    """`L(x2, D(z warped by the flow from x to x2))`, x2 another view of x's scene; occluded pixels do not count.

    `views` names a folder of view pairs with known flow (docs/methods.md), which take the batch's place; without one,
    x2 is x seen through a random homography, whose flow is known. strength = 0 is then Equation 1 up to rounding.
    """

    limits: ClassVar = {"strength": (0.0, 1.0)}

    p: float = 0.5
    views: Path | None = None
    strength: float = 1.0
    """1: a homography that moves places by up to about a fifth of the side."""

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse views of another size before anything is written."""
        super().check(autoencoder, image_size=image_size, num_images=num_images)
        if self.views is not None:
            self.check_rgb(autoencoder)
            check_views(self.views, image_size)

    def act(self, batch: Batch) -> Drawn:
        """Draw the homography, or which scenes are seen."""
        if self.views is not None:
            return self._seen(batch)
        u = self.strength * (2.0 * torch.rand(8, generator=batch.generator) - 1.0)
        scale = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.15, 0.15])
        matrix = torch.eye(3) + torch.cat([u * scale, torch.zeros(1)])[[0, 1, 4, 2, 3, 5, 6, 7, 8]].view(3, 3)

        def tau(x: torch.Tensor) -> torch.Tensor:
            return warp(x, project(matrix, x.shape[-2], x.shape[-1]))

        mask = is_inside(project(matrix, *batch.latent_size), batch.stride).to(batch.x.device)
        return Drawn(image=tau, latent=tau, mask=mask, name="another view")

    def _seen(self, batch: Batch) -> Drawn:
        assert self.views is not None
        numbers = (batch.rand_each() * 2**20).long().tolist()
        scenes = read_views(self.views, numbers, image_size_px=batch.x.shape[-1], stride=batch.stride)
        first, second, mask = (part.to(batch.x.device) for part in (scenes.first, scenes.second, scenes.mask))
        return Drawn(
            before=lambda x: first, image=lambda x: second, latent=lambda z: warp(z, scenes.grid), mask=mask,
            name="another view",
        )  # fmt: skip
