"""A term for `eqvae finetune --method`: latents are drawn to those of TAESD, which are SD-VAE's."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method


@method("taesd")
class Taesd(Term):
    """`|mean E(x) - E_teacher(x)|^2` for x as it is, and for x made smaller by each of the factors.

    Each is averaged over the latent; their sum is multiplied by x's values, over which L sums.
    """

    default_weight = 2.0

    teacher: str = "taesd"
    factors: tuple[float, ...] = ()

    def build(self, autoencoder: Autoencoder, *, image_size_px: int) -> nn.Module:
        """Load the teacher."""
        del autoencoder, image_size_px
        return load_autoencoder(self.teacher).requires_grad_(False).eval()

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Compare the latents."""
        assert encoded.part is not None
        pairs = [(encoded.x, encoded.posterior.mode())]
        for factor in self.factors:
            smaller = F.interpolate(encoded.x, scale_factor=factor, mode="bicubic", antialias=True).clamp(-1.0, 1.0)
            pairs.append((smaller, encoded.autoencoder.encode(smaller).mode()))
        distances = [(z.float() - encoded.part.encode(x).mode().float()).square().mean((1, 2, 3)) for x, z in pairs]
        return encoded.x[0].numel() * torch.stack(distances).sum(0)
