"""Scale equivariance: Skorokhodov et al., arXiv:2502.14831; lmb-freiburg/orbis, `models/first_stage/vqgan.py`."""

from fractions import Fraction
from typing import ClassVar

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.methods.protocol import Batch, Drawn, Pair, show
from eqvae.methods.registry import method
from eqvae.transforms import Interpolation, Scale


@method("se")
class Se(Pair):
    """`L(x, D(z)) + weight L(S x, D(S z))`, S shrinks k times: scale equivariance.

    Both in every step, no rotation. An exactly equivariant autoencoder loses nothing by it; weight = 0 is Equation 1.
    """

    limits: ClassVar = {"weight": (0.0, 1e6), "k": (2, 1024)}

    k: tuple[int, ...] = (2, 3, 4)
    """Factors to draw from; those that leave no whole cells are left out."""

    weight: float = 0.25
    """Of the shrunk comparison."""

    interpolation: Interpolation = "bilinear"
    """How images and latents are shrunk."""

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse images that no factor shrinks to whole cells."""
        super().check(autoencoder, image_size=image_size, num_images=num_images)
        rows, columns = (side_px // autoencoder.stride for side_px in image_size)
        if not self._whole(rows, columns):
            raise UserError(
                f"--method se(k={show(self.k)}) leaves no whole cells of a latent of {rows} x {columns}",
                "Choose another k or --image-size",
            )

    def smallest_side(self, latent_side: int) -> int:
        """See `Pair`."""
        return latent_side // max(self._whole(latent_side), default=1)

    def act(self, batch: Batch) -> Drawn:
        """Draw the factor."""
        k = batch.choose(self._whole(*batch.latent_size))
        scale = Scale(Fraction(1, k), Fraction(1, k), self.interpolation)
        return Drawn(image=scale, latent=scale, weight=self.weight, plain_weight=1.0, name=str(scale))

    def _whole(self, *sides: int) -> list[int]:
        """The factors that leave whole cells of all sides."""
        return [k for k in self.k if not any(side % k for side in sides)]
