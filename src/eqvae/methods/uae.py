"""Band dropping: WeichenFan/UAE, after the paper's description."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method
from eqvae.methods.spectra import dct, inverse_dct


@method("uae")
class Uae(Pair):
    """`L(x, D(z with its first m DCT coefficients in zigzag order))`: band dropping.

    With as many coefficients as cells it is Equation 1.
    """

    limits: ClassVar = {"low": (1, 1e9), "high": (1, 1e9)}

    p: float = 0.5
    low: int = 32
    """m is uniform between this and `high`, for each step; the source's values."""
    high: int = 256

    def act(self, batch: Batch) -> Drawn:
        """Draw how many coefficients are kept."""
        m = batch.choose(range(self.low, self.high + 1))
        height, width = batch.latent_size
        if m >= height * width:
            return Drawn(branch=self.name, name="all coefficients")
        kept = (zigzag(height, width) < m).to(batch.x.device)

        def keep(z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
            return inverse_dct(dct(z) * kept).to(z.dtype)

        return Drawn(latent=keep, name=f"{m} coefficients")


def zigzag(height: int, width: int) -> Tensor:
    """The place of each coefficient in JPEG's order."""
    places = [(v, u) for v in range(height) for u in range(width)]
    places.sort(key=lambda place: (sum(place), place[1] if sum(place) % 2 == 0 else place[0]))
    ranks = torch.empty(height, width, dtype=torch.int64)
    for rank, place in enumerate(places):
        ranks[place] = rank
    return ranks
