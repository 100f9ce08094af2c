"""Two caches of the same images by two autoencoders: which rows belong together, and how their patches covary."""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.alignment import PatchMoments
from eqvae.latents.cache import LatentCache, Normalization

_BATCH_SIZE = 256


@final
@dataclass(frozen=True, kw_only=True)
class Patched:
    """A cache as a transformer sees it."""

    cache: LatentCache

    normalization: Normalization
    """The transformer's."""

    patch_size: int
    """Cells."""

    def patches(self, rows: Int64[Tensor, " n"], *, mirrored: bool) -> Float[Tensor, "patches values"]:
        """Read normalized posterior means, patch by patch, each in the order (channel, row, column)."""
        flags = torch.full((len(rows),), mirrored)
        raw = self.cache.normalization.denormalize(self.cache.read(rows, mirrored=flags).latents)
        patches = F.unfold(self.normalization.normalize(raw), self.patch_size, stride=self.patch_size)
        return patches.transpose(1, 2).flatten(0, 1).double()


def match(old: LatentCache, new: LatentCache) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Find the rows of the images that both caches hold; the caches have to be of the same data."""
    if old.index.data_fingerprint != new.index.data_fingerprint or old.index.preprocessing != new.index.preprocessing:
        raise UserError(
            f"The latents in '{old.folder}' are of other images ('{old.index.data}') than those in '{new.folder}' "
            f"('{new.index.data}')",
            "Encode the same images with both autoencoders",
        )
    if max(len(old.shapes), len(new.shapes)) > 1:
        raise UserError(
            f"The latents in '{old.folder}' and '{new.folder}' are not of one shape", "Encode with one --image-size"
        )
    _, rows, others = np.intersect1d(
        old.source_indices().numpy(), new.source_indices().numpy(), assume_unique=True, return_indices=True
    )
    if not len(rows):
        raise UserError(f"'{old.folder}' and '{new.folder}' have no image in common", "Encode the same ones")
    return torch.from_numpy(rows), torch.from_numpy(others)


def patch_moments(old: Patched, new: Patched, *, num_images: int) -> PatchMoments:
    """Sum moments over at most so many of the images that both hold, spread evenly, and their mirror images."""
    rows, others = match(old.cache, new.cache)
    kept = torch.linspace(0, len(rows) - 1, min(num_images, len(rows)), dtype=torch.float64).round().long()
    sides = [False, True] if old.cache.index.has_mirrored and new.cache.index.has_mirrored else [False]
    sums, count = [torch.zeros(()).double()] * 5, 0
    for chosen in kept.split(_BATCH_SIZE):
        for mirrored in sides:
            z, w = (each.patches(own[chosen], mirrored=mirrored) for each, own in ((old, rows), (new, others)))
            parts = (z.sum(0), w.sum(0), z.T @ z, w.T @ z, w.T @ w)
            sums, count = [total + part for total, part in zip(sums, parts, strict=True)], count + len(z)
    mean_z, mean_w, zz, wz, ww = (total / count for total in sums)
    return PatchMoments(
        mean_z=mean_z,
        mean_w=mean_w,
        zz=zz - mean_z.outer(mean_z),
        wz=wz - mean_w.outer(mean_z),
        ww=ww - mean_w.outer(mean_w),
    )
