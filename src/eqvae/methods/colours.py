"""Maps of colours: drawn, fitted to latents, applied."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eqvae.methods.protocol import Batch

_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
"""From RGB to luma and two differences of colour, the source's; saturation and hue act on the latter."""


def draw_colours(generator: torch.Generator, strength: float) -> tuple[Float[Tensor, "3 3"], Float[Tensor, " 3"]]:
    """Draw brightness, then contrast around grey, saturation and hue, each half of the time: c to A c + b."""
    values = torch.rand(8, generator=generator)
    u = (values[:4] < 0.5).float() * strength * (2.0 * values[4:] - 1.0)
    brightness, contrast = 1.0 + 0.3 * u[0], 1.0 + 0.3 * u[1]
    saturation = 1.0 + (0.5 if u[2] > 0 else 0.95) * u[2]
    cosine, sine = torch.cos(u[3] * math.pi / 4), torch.sin(u[3] * math.pi / 4)
    turn = torch.eye(3)
    turn[1, 1], turn[1, 2], turn[2, 1], turn[2, 2] = cosine, sine, -sine, cosine
    luma = _YIQ[:1].expand(3, 3)
    colours = torch.linalg.inv(_YIQ) @ turn @ _YIQ @ (saturation * torch.eye(3) + (1.0 - saturation) * luma)
    # Colours are in [-1, 1]: grey, which saturation and hue leave, is 0, and black, which brightness leaves, is -1.
    return colours * brightness * contrast, (contrast * (brightness - 1.0)).expand(3)


def fit_colours(batch: Batch, z: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "3 c"], Float[Tensor, " 3"]]:
    """Fit a cell's mean colour by its latent, over all processes' cells: W and c0, in float64 on the CPU."""
    colours = F.adaptive_avg_pool2d(batch.x, (z.shape[-2], z.shape[-1])).cpu().double().flatten(2).transpose(1, 2)
    latents = z.detach().cpu().double().flatten(2).transpose(1, 2)
    design = torch.cat([latents, torch.ones_like(latents[..., :1])], dim=-1).flatten(0, 1)
    sums = batch.processes.sum(design.T @ torch.cat([design, colours.flatten(0, 1)], dim=-1))
    solution = torch.linalg.pinv(sums[:, :-3], rtol=1e-12, hermitian=True) @ sums[:, -3:]
    return solution[:-1].T, solution[-1]


def map_colours(
    x: Float[Tensor, "n c h w"], m: Float[Tensor, "c c"], offset: Float[Tensor, " c"]
) -> Float[Tensor, "n c h w"]:
    """Send each colour, or latent, through one affine map."""
    with torch.autocast(x.device.type, enabled=False):
        mapped = torch.einsum("dc,nchw->ndhw", m.float().to(x.device), x.float())
        mapped = mapped + offset.float().to(x.device)[:, None, None]
    return mapped.to(x.dtype)
