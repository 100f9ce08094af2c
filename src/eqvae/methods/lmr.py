"""Latent masking: zai-org/SSVAE, `ssvae/models/autoencoder.py`."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


class Token(nn.Module):
    """The learned vector: trained with the autoencoder, and not exported with it."""

    def __init__(self, num_channels: int) -> None:
        """Begin at a normal draw, as the source does."""
        super().__init__()
        self.vector = nn.Parameter(torch.randn(1, num_channels, 1, 1))


@method("lmr")
class Lmr(Pair):
    """`L(x, D(z with cells replaced by one learned vector))`: latent masking.

    The same cells for all images of a step, as in the source. ratios=[0] is Equation 1.
    """

    limits: ClassVar = {"ratios": (0.0, 1.0)}

    p: float = 0.3
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the cells that are replaced; one is drawn for each step; the source's, as is p."""

    def build(self, autoencoder: Autoencoder, *, image_size_px: int) -> nn.Module:
        """Make the vector."""
        del image_size_px
        return Token(autoencoder.latent_channels)

    def act(self, batch: Batch) -> Drawn:
        """Draw the cells."""
        assert isinstance(batch.part, Token)
        height, width = batch.latent_size
        ratio, vector = batch.choose(self.ratios), batch.part.vector
        order = torch.randperm(height * width, generator=batch.generator)
        masked = (order < int(ratio * height * width)).view(height, width).to(batch.x.device)

        def replace(z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            return torch.where(masked, vector.to(z.dtype), z)

        return Drawn(latent=replace, name=f"{ratio:.0%} masked")
