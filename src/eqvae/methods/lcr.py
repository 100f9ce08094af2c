"""Local correlation: zai-org/SSVAE, `losses/loss_factory.py` and `regularizers/calc_local_corr.py`."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method


@method("lcr")
class Lcr(Term):
    """`relu(0.75 - r)`, r the mean correlation of the channel vectors in windows of 2 x 2 cells: local correlation.

    Zero where the cells of a window are alike. The source averages r over the batch before the threshold, this over
    each image.
    """

    default_weight = 0.002  # the source's 0.1 x 0.02
    limits: ClassVar = {"threshold": (-1.0, 1.0), "window": (2, 64)}

    adaptive: bool = True
    threshold: float = 0.75
    window: int = 2

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse latents that can't be cut into windows, and those of one channel, which have no correlation."""
        super().check(autoencoder, image_size=image_size, num_images=num_images)
        (rows, columns), channels = (px // autoencoder.stride for px in image_size), autoencoder.latent_channels
        if min(rows, columns) < self.window or channels < 2:
            raise UserError(
                f"--method lcr needs windows of {self.window} x {self.window} cells and two channels at least, and "
                f"the latent has {channels} of {rows} x {columns}",
                "Use a larger --image-size, or another method",
            )

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Correlate all pairs of cells in a window."""
        k = self.window
        z = encoded.z.float()
        z = z[..., : z.shape[-2] // k * k, : z.shape[-1] // k * k]  # a low-resolution step may leave a rest
        cells = z.unflatten(-1, (-1, k)).unflatten(-3, (-1, k)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        centred = cells - cells.mean(-1, keepdim=True)
        unit = centred / (centred.norm(dim=-1, keepdim=True) + 1e-8)
        with torch.autocast(z.device.type, enabled=False):
            correlations = unit @ unit.transpose(-2, -1)
        rows, columns = torch.triu_indices(k * k, k * k, offset=1)
        return F.relu(self.threshold - correlations[..., rows, columns].mean((1, 2)))
