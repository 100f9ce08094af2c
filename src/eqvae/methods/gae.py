"""GAE's normalized, noisy latents: sii-research/GAE, `tokenizer/utils/sample/rms_norm.py` and `sigma_vae.py`."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


@method("gae")
class Gae(Pair):
    """`L(x, D(z / rms(z) + s e))`, rms over channels, e ~ N(0, I), s ~ N(0, (sigma / 0.8)^2) for each image: GAE.

    The source trains without KL, and always normalizes. An exported model has no such layer: the other half of the
    steps decodes raw latents, so that diffusers loads it and decodes what it encodes.
    """

    wants_kl = False
    not_discrete: ClassVar[str] = "codes would be pulled to noise"
    limits: ClassVar = {"sigma": (0.0, 1e6)}

    p: float = 0.5
    sigma: float = 0.2
    """The source's value."""

    def act(self, batch: Batch) -> Drawn:
        """Draw s and e."""
        noise = self.sigma / 0.8 * batch.randn_each(1, 1, 1) * batch.latent_noise()

        def normalize(z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            values = z.float()
            return (values * torch.rsqrt(values.square().mean(1, keepdim=True) + 1e-6) + noise).to(z.dtype)

        return Drawn(latent=normalize, name=f"normalized, sigma = {self.sigma:g}")
