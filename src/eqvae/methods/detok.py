"""l-DeTok's latent noise: Jiawei-Yang/DeTok, arXiv:2507.15856, `models/detok.py`."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


@method("detok")
class Detok(Pair):
    """`L(x, D((1 - t) z + t gamma sigma e))`, e ~ N(0, I), t uniform in (0, 1) for each image: l-DeTok.

    sigma is the batch's standard deviation of latents, so that gamma means the same for every autoencoder. The source
    then trains the decoder alone without noise: `--polish-steps`. With t = 0 it is Equation 1.
    """

    not_discrete: ClassVar[str] = "codes would be pulled to noise"
    limits: ClassVar = {"gamma": (0.0, 1e6), "max_t": (0.0, 1.0)}

    gamma: float = 3.0
    """Noise in standard deviations of the latent; the source's value."""

    max_t: float = 1.0
    """t is uniform between 0 and this."""

    def act(self, batch: Batch) -> Drawn:
        """Draw t and e."""
        t, noise = self.max_t * batch.rand_each(1, 1, 1), batch.latent_noise()

        def interpolate(z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            return (1.0 - t) * z + t * (self.gamma * batch.deviation(z) * noise)

        return Drawn(latent=interpolate, name=f"noise, gamma = {self.gamma:g}")
