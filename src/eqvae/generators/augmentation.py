"""Differentiable augmentation of what a discriminator sees, Zhao et al., arXiv:2006.10738, in GAT's order and values.

Colour with probability 1/2 (brightness -0.5 ... 0.5, saturation 0 ... 2, contrast 0.5 ... 1.5), a shift of up to an
eighth with zeros behind it, a square of half the side cut out, mirrored with probability 0.4. It is drawn once for an
image, and the same for all that is made of it.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

NUM_DRAWS: Final = 9
"""Uniform numbers for each image."""

_SHIFT, _CUT, _COLOUR, _MIRROR = 0.125, 0.5, 0.5, 0.4


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """One augmentation for each image of a batch."""

    is_coloured: Bool[Tensor, "n 1 1 1"]
    brightness: Float[Tensor, "n 1 1 1"]
    saturation: Float[Tensor, "n 1 1 1"]
    contrast: Float[Tensor, "n 1 1 1"]
    grey: Float[Tensor, "n 1 h w"]
    """Mean over channels, from which saturation departs."""
    mean: Float[Tensor, "n 1 1 1"]
    """From which contrast departs."""
    places: Int64[Tensor, "n cells"]
    """Where each cell comes from, mirrored and shifted."""
    is_kept: Float[Tensor, "n 1 h w"]
    """0 where a cell comes from outside or is cut out."""

    @classmethod
    def draw(cls, uniform: Float[Tensor, "n draws"], x: Float[Tensor, "n c h w"]) -> "Augmentation":
        """Turn uniform numbers into an augmentation, which departs from the means of these images."""
        height, width = x.shape[-2:]
        coloured, brightness, saturation, contrast, row_shift, column_shift, row_cut, column_cut, mirrored = (
            uniform.unbind(1)
        )
        rows, rows_kept = _axis(row_shift, height)
        columns, columns_kept = _axis(column_shift, width)
        cut = _cut(row_cut, height)[:, :, None] & _cut(column_cut, width)[:, None, :]
        kept = rows_kept[:, :, None] & columns_kept[:, None, :] & ~cut
        is_mirrored = (mirrored < _MIRROR)[:, None, None]
        places = rows[:, :, None] * width + columns[:, None, :]
        return cls(
            is_coloured=_column(coloured) < _COLOUR,
            brightness=_column(brightness) - 0.5,
            saturation=_column(saturation) * 2,
            contrast=_column(contrast) + 0.5,
            grey=x.mean(1, keepdim=True),
            mean=x.mean((1, 2, 3), keepdim=True),
            places=torch.where(is_mirrored, places.flip(2), places).flatten(1),
            is_kept=torch.where(is_mirrored, kept.flip(2), kept)[:, None].to(x.dtype),
        )

    def __call__(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        coloured = (x + self.brightness - self.grey) * self.saturation + self.grey
        coloured = (coloured - self.mean) * self.contrast + self.mean
        x = torch.where(self.is_coloured, coloured, x)
        moved = x.flatten(2).gather(2, self.places[:, None].expand(-1, x.shape[1], -1)).view_as(x)
        return moved * self.is_kept


def _axis(shift: Float[Tensor, " n"], size: int) -> tuple[Int64[Tensor, "n size"], Bool[Tensor, "n size"]]:
    """Say where the cells of an axis come from, and which of them from inside."""
    most = int(size * _SHIFT + 0.5)
    places = torch.arange(size, device=shift.device) + (shift * (2 * most + 1)).long()[:, None] - most
    return places.clamp(0, size - 1), (places >= 0) & (places < size)


def _cut(uniform: Float[Tensor, " n"], size: int) -> Bool[Tensor, "n size"]:
    """Mark the cells of an axis that are cut out; at the edges fewer are."""
    length = int(size * _CUT + 0.5)
    first = (uniform * (size + 1 - length % 2)).long()[:, None] - length // 2
    cells = torch.arange(size, device=uniform.device)
    return (cells >= first) & (cells < first + length)


def _column(values: Float[Tensor, " n"]) -> Float[Tensor, "n 1 1 1"]:
    return values[:, None, None, None]
