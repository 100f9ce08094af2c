"""RAE's additive noise: bytetriper/RAE, arXiv:2510.11690, `src/stage1/rae.py`."""

from typing import ClassVar

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


@method("rae-noise")
class RaeNoise(Pair):
    """`L(x, D(z + s e))`, e ~ N(0, I), s = tau u with u uniform in (0, 1) for each image: RAE's decoder.

    The source's latents are normalized; tau counts in standard deviations of the latent. With tau = 0 it is Equation 1.
    """

    not_discrete: ClassVar[str] = "codes would be pulled to noise"
    limits: ClassVar = {"tau": (0.0, 1e6)}

    tau: float = 0.8
    """Largest standard deviation of the noise, in standard deviations of the latent; the source's value."""

    def act(self, batch: Batch) -> Drawn:
        """Draw s and e."""
        noise = self.tau * batch.rand_each(1, 1, 1) * batch.latent_noise()
        return Drawn(latent=lambda z: z + batch.deviation(z) * noise, name=f"noise, tau = {self.tau:g}")
