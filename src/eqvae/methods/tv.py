"""Total variation of latents: an ablation."""

from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method


@method("tv")
class Tv(Term):
    """Mean absolute difference of neighbouring cells: total variation.

    Zero for constant latents. It is smaller for smaller latents, too: look at their scale beside it.
    """

    default_weight = 0.1  # as VF's

    adaptive: bool = True

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Along both axes."""
        z = encoded.z.float()
        return z.diff(dim=-1).abs().flatten(1).mean(1) + z.diff(dim=-2).abs().flatten(1).mean(1)
