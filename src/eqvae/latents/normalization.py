"""Raw latents to normalized ones and back."""

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.errors import UserError, nearest_name
from eqvae.latents.index import CacheIndex

MEASURED = "measured"
"""Normalize by the cache's own per-channel mean and standard deviation."""

FIXED = "fixed:"
"""`fixed:0.18215` multiplies raw latents by this factor and shifts nothing, as the paper's generators do."""


@final
@dataclass(frozen=True, kw_only=True)
class Normalization:
    """`normalized = (z - shift) / scale`, per channel."""

    shift: Float[Tensor, " c"]

    scale: Float[Tensor, " c"]

    def normalize(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Turn raw latents into what a generator sees."""
        # In place from the second operation on: at reading, fresh memory costs more than arithmetic.
        return (z - self.shift.to(z)[:, None, None]).div_(self.scale.to(z)[:, None, None])

    def denormalize(self, normalized: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Turn what a generator drew into what the decoder takes."""
        scale, shift = self.scale.to(normalized), self.shift.to(normalized)
        return normalized * scale[:, None, None] + shift[:, None, None]


def choose_normalization(name: str, index: CacheIndex) -> Normalization:
    """Resolve a normalization's name."""
    if index.statistics is None:  # tokens
        return Normalization(shift=torch.zeros(0), scale=torch.ones(0))
    if name == MEASURED:
        scale = torch.tensor(index.statistics.std)
        if not bool((scale > 0).all()):
            raise UserError("A latent channel of the cache never varies", f"Normalize with '{FIXED}FACTOR'")
        return Normalization(shift=torch.tensor(index.statistics.mean), scale=scale)
    return fixed_normalization(name, index.latent_channels)


def fixed_normalization(name: str, num_channels: int) -> Normalization:
    """Read `fixed:FACTOR`."""
    if not name.startswith(FIXED):
        known = (MEASURED, f"{FIXED}0.18215")
        raise UserError(f"The normalization '{name}' is not known", nearest_name(name, known))
    try:
        factor = float(name.removeprefix(FIXED))
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"The normalization '{name}' has no positive factor", f"Write it as '{FIXED}0.18215'")
    return Normalization(shift=torch.zeros(num_channels), scale=torch.full((num_channels,), 1.0 / factor))
