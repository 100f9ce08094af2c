"""Equation 4 of arXiv:2502.09509: the ablation of Table 7."""

from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.methods.protocol import Action, Batch, Drawn, Encoded, Term
from eqvae.methods.registry import method
from eqvae.methods.transform_config import TransformConfig


def explicit_loss(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n k h w"],
    z: Float[Tensor, "n c h2 w2"],
    tau: Action,
    *,
    stop_gradient: bool = False,
) -> Float[Tensor, " n"]:
    """`||tau o E(x) - E(tau o x)||^2`, Equation 4, given z = E(x): the ablation of Table 7; latents collapse."""
    transformed = autoencoder.encode(tau(x)).mode()
    if stop_gradient:
        transformed = transformed.detach()
    return (tau(z) - transformed).float().square().flatten(1).sum(1)


@method("explicit")
class Explicit(TransformConfig, Term):
    """`||tau o E(x) - E(tau o x)||^2`, Equation 4: latents collapse.

    Zero for an exactly equivariant encoder; it draws a tau of its own, as `eq` does, and is silent in its plain branch.
    """

    default_weight = 0.1  # Table 7

    stop_gradient: bool = False
    """On E(tau o x)."""

    def draw(self, batch: Batch) -> Drawn:
        """Draw tau."""
        return Drawn.of(self.sampler().draw(batch.latent_size, batch.generator))

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Equation 4 in the equivariance branch."""
        x, z, tau = encoded.x, encoded.posterior.mode(), encoded.drawn.image
        if encoded.drawn.branch != "equivariance":
            return x.new_zeros(len(x))
        return explicit_loss(encoded.autoencoder, x, z, tau, stop_gradient=self.stop_gradient)
