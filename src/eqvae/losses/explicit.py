"""Explicit regularization (Equation 4), for the ablation of Table 7: it collapses the latent space."""

from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.transforms import Transform


def explicit_loss(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n 3 h w"],
    z: Float[Tensor, "n c h2 w2"],
    tau: Transform,
    *,
    stop_gradient: bool,
) -> Float[Tensor, " n"]:
    """`||tau o E(x) - E(tau o x)||^2`, Equation 4."""
    transformed = autoencoder.encode(tau(x)).mode()
    if stop_gradient:
        transformed = transformed.detach()
    return (tau(z) - transformed).float().square().flatten(1).sum(1)
