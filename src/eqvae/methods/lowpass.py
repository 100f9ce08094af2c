"""Latents no richer in high frequencies than wanted: what is left of EQ-VAE if only its spectrum is copied?"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from eqvae.methods.protocol import Encoded, Term
from eqvae.methods.registry import method
from eqvae.runtime.processes import Processes, sum_with_gradient

_LOWEST = 0.25  # cycles per cell


@method("lowpass")
class Lowpass(Term):
    """`max(0, excess(z) - excess_db)`: no more power above a quarter of a cycle per cell than that, in dB.

    excess is `evaluate --all`'s `spectrum_excess_db` of a micro-batch: latents' power over that of the images on their
    grid. Ours, for `eqvae reproduce causes`; an equivariant autoencoder need not have a smaller value.
    """

    limits: ClassVar = {"excess_db": (-100.0, 100.0)}
    default_weight = 1000.0

    excess_db: float = 0.0
    """What is left alone."""

    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """The same number for each image: a spectrum is that of all processes' images."""
        images = avg_pool2d(encoded.x.float(), encoded.autoencoder.stride)
        ratio = _ring_power(encoded.z.float(), encoded.processes) / _ring_power(images, encoded.processes)
        excess = 10.0 * ratio.log10().mean()
        return (excess - self.excess_db).clamp(min=0.0).expand(len(encoded.z))


def _ring_power(x: Float[Tensor, "n c h w"], processes: Processes) -> Float[Tensor, " rings"]:
    """Mean power of standardized channels in rings of frequencies from a quarter to half a cycle per cell."""
    height, width = x.shape[-2:]
    vertical, horizontal = (torch.fft.fftfreq(side, device=x.device) for side in (height, width))
    radius = torch.hypot(vertical[:, None], horizontal[None, :])
    side = min(height, width)
    ring = (radius * side + 0.5).floor().long()  # as `eqvae.metrics.spectrum`: 1 / side wide
    centred = x - _mean(x, processes, (0, 2, 3))
    deviation = _mean(centred.square(), processes, (0, 2, 3)).clamp(min=1e-12).sqrt()
    power = _mean(torch.fft.fft2(centred / deviation, norm="ortho").abs().square(), processes, (0, 1))[0, 0]
    wanted = [ring == number for number in range(1, side // 2 + 1)]
    kept = [inside & (radius <= 0.5) for inside in wanted]
    rings = [inside for inside in kept if bool(inside.any()) and float(radius[inside].mean()) > _LOWEST]
    return torch.stack([power[inside].mean() for inside in rings])


def _mean(x: Float[Tensor, "n c h w"], processes: Processes, dims: tuple[int, ...]) -> Float[Tensor, "n2 c2 h2 w2"]:
    """Average over the images of all processes, which have equally many."""
    mean = x.mean(dims, keepdim=True)
    return mean if processes.count == 1 else sum_with_gradient(mean) / processes.count
