"""Channel dropping: DC-AE 1.5, arXiv:2508.00413, by the paper alone."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method


@method("channel-drop")
class ChannelDrop(Pair):
    """`L(x, D(z with all but the first c' channels set to 0))`, c' uniform in 1 ... c for each step: a nested latent.

    With c' = c it is Equation 1.
    """

    not_discrete: ClassVar[str] = "the nearest code has all its channels again"
    limits: ClassVar = {"smallest": (1, 1e6)}

    p: float = 0.5
    smallest: int = 1
    """Fewest channels that are kept."""

    def act(self, batch: Batch) -> Drawn:
        """Draw c'."""
        count = batch.latent_channels
        kept = batch.choose(range(min(self.smallest, count), count + 1))
        mask = (torch.arange(count) < kept).to(batch.x.device)[:, None, None]

        def drop(z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            return z * mask

        return Drawn(latent=drop, name=f"{kept} of {count} channels")
