"""Spectrum masking: forever208/SpectrumMatching, arXiv:2603.14645, branch DSM, `modules/vae.py`."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, arange

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method
from eqvae.methods.spectra import dct, inverse_dct

_BLOCK = 8


@method("dsm")
class Dsm(Pair):
    """`L(m x, D(m z))`, m sets the coefficients u + v >= 15 - k of each 8 x 8 block's DCT to 0: spectrum masking.

    The source trains without KL. k = 0 masks nothing: Equation 1.
    """

    wants_kl = False
    limits: ClassVar = {"k": (0, 14)}

    k: tuple[int, ...] = (0, 8, 10, 12)
    """How many of the 15 diagonals are masked; one is drawn for each step; the source's values."""

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse latents that can't be cut into blocks."""
        super().check(autoencoder, image_size=image_size, num_images=num_images)
        rows, columns = (side_px // autoencoder.stride for side_px in image_size)
        if rows % _BLOCK or columns % _BLOCK:
            raise UserError(
                f"--method dsm cuts latents into blocks of 8 x 8 cells, and {rows} x {columns} can't be cut",
                f"Use an --image-size that is a multiple of {_BLOCK * autoencoder.stride}",
            )

    def act(self, batch: Batch) -> Drawn:
        """Draw how much is masked."""
        k = batch.choose(self.k)
        if k == 0:
            return Drawn(branch=self.name)

        def mask(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            blocks = x.unflatten(-1, (-1, _BLOCK)).unflatten(-3, (-1, _BLOCK)).transpose(-3, -2)
            u = arange(_BLOCK, device=x.device)
            kept = (u[:, None] + u < 15 - k).float()
            return inverse_dct(dct(blocks) * kept).transpose(-3, -2).flatten(-4, -3).flatten(-2).to(x.dtype)

        return Drawn(image=mask, latent=mask, name=f"u + v < {15 - k}")
