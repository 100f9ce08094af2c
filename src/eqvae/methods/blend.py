"""Blending: KohakuBlueleaf/HakuLatent, `transform/feature.py`."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


@method("blend")
class Blend(Pair):
    """`L((1 - s) x + s x', D((1 - s) z + s z'))`, x' the neighbour in the batch: blending.

    Images are neighbours in pairs, so that any number of processes blends the same. An autoencoder whose encoder is
    linear loses nothing by it; s = 0 is Equation 1.
    """

    limits: ClassVar = {"low": (0.0, 1.0), "high": (0.0, 1.0)}

    p: float = 0.5
    low: float = 0.5
    """s is uniform between this and `high`; the source's 0.5 unless given."""
    high: float = 0.5

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse an image without a neighbour."""
        super().check(autoencoder, image_size=image_size, num_images=num_images)
        if num_images % 2:
            raise UserError(
                f"--method blend takes images in pairs, and a part of the batch holds {num_images}",
                "Choose --batch-size and --gradient-accumulation-steps so that each process's parts are even",
            )

    def act(self, batch: Batch) -> Drawn:
        """Draw s."""
        s = self.low + (self.high - self.low) * batch.rand()

        def blend(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            return (1.0 - s) * x + s * x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

        return Drawn(image=blend, latent=blend, name=f"blend, s = {s:.3g}")
