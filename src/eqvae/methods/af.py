"""Shift equivariance: AF-LDM, arXiv:2503.09419, by its formula alone."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Batch, Drawn, Encoded, Term
from eqvae.methods.registry import method
from eqvae.methods.warping import shift_by_phase


@method("af")
class Af(Term):
    """`||E(T x) - sg T' z||^2 + ||D(T' sg z) - sg T D(z)||^2`: T shifts by pixels, T' by the same parts of cells.

    T' is a shift in Fourier space; what T brings in from the other side does not count. Zero for an exactly equivariant
    autoencoder and shifts by whole cells.
    """

    default_weight = 1.0  # the source's, with a learning rate of 1e-5
    trains_decoder = True
    limits: ClassVar = {"largest": (0.0, 1.0)}

    largest: float = 0.375
    """Largest shift, as a share of the side; the source's value."""

    def draw(self, batch: Batch) -> Drawn:
        """Draw the shift in px."""
        sides = batch.x.shape[-2:]
        down, right = (batch.choose(range(-int(self.largest * side), int(self.largest * side) + 1)) for side in sides)
        stride, (rows, columns) = batch.stride, (torch.arange(side) for side in sides)
        is_known = (rows >= down) & (rows < sides[0] + down), (columns >= right) & (columns < sides[1] + right)
        mask = torch.outer(*(each.float() for each in is_known))[None, None].to(batch.x.device)
        return Drawn(
            image=lambda x: torch.roll(x, (down, right), (-2, -1)),
            latent=lambda z: shift_by_phase(z, down / stride, right / stride),
            mask=mask, name=f"shift ({down}, {right}) px",
        )  # fmt: skip

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Compare where the shifted picture is known."""
        autoencoder, x, drawn, z = encoded.autoencoder, encoded.x, encoded.drawn, encoded.posterior.mode()
        assert drawn.mask is not None
        pixels = drawn.mask
        if pixels.shape[-2:] != x.shape[-2:]:
            return x.new_zeros(len(x))  # the released code's low-resolution step
        cells = -torch.nn.functional.max_pool2d(-pixels, autoencoder.stride)  # whole cells alone
        shifted = drawn.latent(z.detach())
        apart = cells * (autoencoder.encode(drawn.image(x)).mode() - shifted)
        with torch.no_grad():
            target = drawn.image(autoencoder.decode(z))
        decoded = pixels * (autoencoder.decode(shifted) - target)
        return apart.float().square().flatten(1).sum(1) + decoded.float().square().flatten(1).sum(1)
