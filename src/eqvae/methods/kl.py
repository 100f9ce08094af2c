"""L_reg of Equation 1 for a Gaussian encoder."""

from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method


@method("kl")
class Kl(Term):
    """`KL(q(z | x), N(0, I))`, nats per image; `--kl-weight` is its weight, and it is there by default."""

    default_weight = 1e-6  # LDM's
    trains_decoder = True  # there by default, and harmless where the encoder is frozen
    not_discrete = "it has no posterior"

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """`0.5 sum(mean^2 + variance - 1 - log variance)`."""
        return encoded.posterior.kl()
