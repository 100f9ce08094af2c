"""What a sampler tells its callback, and how it asks the backbone."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from eqvae.generators.protocol import Predict


@dataclass(frozen=True, kw_only=True)
class SamplingStep:
    """The state of a batch before one of a sampler's steps."""

    step: int
    """Counted from 0."""

    t: Shaped[Tensor, " n"]
    """What the backbone is told: a diffusion's steps of training, or an interpolant's time. In `dopri5` each image has
    its own."""

    z: Float[Tensor, "n c h w"]
    """Noisy latents at t."""

    denoised: Float[Tensor, "n c h w"]
    """The expected latents without noise, given z: what a preview shows."""


Callback = Callable[[SamplingStep], None]


def ask(
    predict: Predict, z: Float[Tensor, "n c h w"], t: Shaped[Tensor, " n"], labels: Int64[Tensor, " n"]
) -> Float[Tensor, "n c2 h w"]:
    """Call the backbone, and go on in the sampler's own type where the backbone autocasts."""
    return predict(z, t, labels).to(z.dtype)
