"""Photometric equivariance: rashzxbrown/photometric_eqvae, `src/pheq/analytic.py` and `color.py`."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.images.sizes import ImageSize
from eqvae.methods.colours import draw_colours, fit_colours, map_colours
from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


@method("photometric")
class Photometric(Pair):
    """`L(A x + b, D(M z + m))`: brightness, contrast, saturation and hue as one map of colours.

    M = W+ A W + (I - W+ W) and m = W+ (A c0 + b - c0), where W z + c0 is the least-squares colour of a cell, fitted on
    each step's latents without gradient. Where a latent is the cell's mean colour, M = A and m = b, and an averaging
    autoencoder loses nothing. strength = 0 is Equation 1 up to rounding.
    """

    limits: ClassVar = {"strength": (0.0, 1.0)}

    p: float = 0.5
    strength: float = 1.0
    """1: brightness and contrast in [0.7, 1.3], saturation in [0.05, 1.5], hue within 45 degrees, each drawn half of
    the time; the source's ranges."""

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse what has no colours."""
        super().check(autoencoder, image_size=image_size, num_images=num_images)
        self.check_rgb(autoencoder)

    def act(self, batch: Batch) -> Drawn:
        """Draw A and b."""
        a, b = draw_colours(batch.generator, self.strength)

        def latent(z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            w, c0 = fit_colours(batch, z)
            inverse = torch.linalg.pinv(w)
            m = inverse @ a.double() @ w + torch.eye(z.shape[1]) - inverse @ w
            return map_colours(z, m, inverse @ (a.double() @ c0 + b.double() - c0))

        return Drawn(image=lambda x: map_colours(x, a, b), latent=latent, name="colours")
