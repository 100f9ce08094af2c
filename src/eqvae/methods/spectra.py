"""The discrete cosine transform as matrices, which autograd and any device know; energies; a low-pass."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SMALLEST = 1e-8
"""SpectrumMatching's: no energy and no share of one is smaller."""


@lru_cache
def _matrix(size: int) -> Float[Tensor, "k x"]:
    """DCT-II in float64, orthonormal: row k holds cos(pi (2 x + 1) k / (2 size))."""
    k, x = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * (2 * x + 1) * k / (2 * size)) * math.sqrt(2.0 / size)
    rows[0] /= math.sqrt(2.0)
    return rows


def dct(x: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    """DCT-II over the last two axes, in float32."""
    rows, columns = (_matrix(side).to(x.device, torch.float32) for side in x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        return rows @ x.float() @ columns.T


def inverse_dct(x: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    """Undo `dct`."""
    rows, columns = (_matrix(side).to(x.device, torch.float32) for side in x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):
        return rows.T @ x.float() @ columns


def band_energies(x: Float[Tensor, "n c h w"], num_bands: int) -> Float[Tensor, "n bands"]:
    """Mean energy of the DCT's coefficients in rings around zero frequency, which is left out; over channels too."""
    energies = dct(x).square().mean(1).clamp(min=SMALLEST)
    v, u = (torch.arange(side, device=x.device, dtype=torch.float32) for side in x.shape[-2:])
    radius = (v[:, None].square() + u.square()).sqrt()
    ring = (radius / radius.max().clamp(min=1.0) * num_bands).long().clamp(max=num_bands - 1).flatten()
    is_constant = (radius == 0).flatten()
    flat = energies.flatten(1).masked_fill(is_constant, 0.0)
    sums = flat.new_zeros(len(x), num_bands).index_add(1, ring, flat)
    return sums / torch.bincount(ring, minlength=num_bands).clamp(min=1)


def blur(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """7 x 7 Gaussian of deviation 1.2, zero outside: SpectrumMatching's."""
    weights = torch.exp(-torch.arange(-3.0, 4.0, device=x.device).square() / (2 * 1.2**2))
    kernel = torch.outer(weights, weights)
    return F.conv2d(x, (kernel / kernel.sum()).expand(x.shape[1], 1, 7, 7), padding=3, groups=x.shape[1])
