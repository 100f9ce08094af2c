"""EQ-VAE itself: arXiv:2502.09509, Equations 5 to 7."""

from dataclasses import field

from eqvae.methods.protocol import Batch, Drawn, Pair
from eqvae.methods.registry import method
from eqvae.methods.transform_config import TransformConfig


@method("eq")
class Eq(TransformConfig, Pair):
    """`L(tau o x, D(tau o z))`, tau = S(s, s) . R(theta): EQ-VAE.

    Table 5's rows are `eq(transforms=rotation)`, `eq(transforms=scale)` and `eq(transforms=anisotropic)`. An exactly
    equivariant autoencoder loses nothing by it.
    """

    p: float = field(init=False, default=1.0)
    """Its own probability is `equivariance_probability`."""

    def act(self, batch: Batch) -> Drawn:
        """Draw the branch and tau."""
        return Drawn.of(self.sampler().draw(batch.latent_size, batch.generator))

    def draw(self, batch: Batch) -> Drawn:
        """Draw the branch and tau; the sampler knows the plain branch."""
        return self.act(batch)

    def smallest_side(self, latent_side: int) -> int:
        """See `Pair`."""
        return self.sampler().smallest_side(latent_side)
