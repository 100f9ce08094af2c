"""The latent cache, read: posterior moments of images and mirror images on disk, normalized latents in memory.

Sampling from the posterior, mirroring and normalizing happen here, at reading time: the cache itself holds raw moments.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from eqvae.errors import UserError
from eqvae.latents.index import CacheIndex, Kind, ShardEntry, expected_tensors, read_index
from eqvae.latents.shards import MIRRORED, BrokenShardError, Shard, concatenate_labels, to_tensor

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


@final
@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """Latents or tokens of some images, on the CPU."""

    latents: Float[Tensor, "n c h w"] | Int64[Tensor, "n h w"]
    """Normalized, float32; or tokens, 0 ... codebook_size - 1."""

    labels: Int64[Tensor, " n"] | None
    """0 ... num_classes - 1; None where the images have none."""

    indices: Int64[Tensor, " n"]
    """Which images of the cache these are; see `LatentCache.source_indices`."""

    mirrored: Bool[Tensor, " n"]
    """Which of them are mirror images."""


@final
class LatentCache:
    """A latent cache on disk. Reads rows in place, holds no open file, and pickles into workers."""

    def __init__(self, folder: Path, index: CacheIndex, shards: list[Shard], normalization: Normalization) -> None:
        """Put the parts together; `LatentCache.open` finds them."""
        self.folder = folder
        self.index = index
        self.normalization = normalization
        self._shards = shards
        self._firsts = np.array([entry.first for entry in index.shards], np.int64)
        self.shapes = index.all_shapes()

    @classmethod
    def open(cls, folder: Path | str, *, normalization: str = MEASURED) -> "LatentCache":
        """Open a cache and check all that is cheap to check: the index, the files' sizes and headers."""
        folder = Path(folder)
        index, shards = read_index(folder), []
        for entry in index.shards:
            try:
                shard = Shard(folder / entry.file)
                _check_shard(shard, entry, index)
            except BrokenShardError as error:
                raise _broken_shard(folder, entry, index, str(error)) from None
            shards.append(shard)
        return cls(folder, index, shards, choose_normalization(normalization, index))

    def __len__(self) -> int:
        """Count the images; mirror images do not count."""
        return self.index.num_images

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent, of the most frequent shape."""
        return self.index.latent_channels, self.index.latent_height, self.index.latent_width

    @property
    def digest(self) -> str:
        """Digest of all that the shards hold; 16 hexadecimal digits."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.index.shards).encode()).hexdigest()[:16]

    def members(self, shape: int) -> Int64[np.ndarray, " n"]:
        """List the images of one of `shapes`."""
        own = [entry for entry in self.index.shards if entry.shape == shape]
        return np.concatenate([np.arange(entry.first, entry.first + entry.count) for entry in own])

    def read(
        self,
        indices: Int64[Tensor, " n"],
        *,
        mirrored: Bool[Tensor, " n"] | None = None,
        noise: Float[Tensor, "n c h w"] | None = None,
    ) -> LatentBatch:
        """Read latents of one shape, `(mean + std * noise - shift) / scale`."""
        self._require("moments")
        where, mirrored = self._locate(indices, mirrored)
        z = self._gather("mean", where, mirrored).float()
        if noise is not None and self.index.has_std:
            z.addcmul_(self._gather("std", where, mirrored).float(), noise)
        latents = self.normalization.normalize(z)
        if not bool(latents.isfinite().all()):
            image = int(indices[~latents.isfinite().flatten(1).all(1)][0])
            shard = int(np.searchsorted(self._firsts, image, side="right")) - 1
            raise _broken_shard(self.folder, self.index.shards[shard], self.index, "holds NaN or infinite latents")
        return LatentBatch(latents=latents, labels=self._labels(where), indices=indices, mirrored=mirrored)

    def read_tokens(self, indices: Int64[Tensor, " n"], *, mirrored: Bool[Tensor, " n"] | None = None) -> LatentBatch:
        self._require("tokens")
        where, mirrored = self._locate(indices, mirrored)
        tokens = self._gather("tokens", where, mirrored).long()
        return LatentBatch(latents=tokens, labels=self._labels(where), indices=indices, mirrored=mirrored)

    def labels(self) -> Int64[Tensor, " n"] | None:
        """Read the labels of all images."""
        if self.index.num_classes is None:
            return None
        return torch.from_numpy(concatenate_labels(self._shards, "labels"))

    def source_indices(self) -> Int64[Tensor, " n"]:
        """Tell where each image stands in DATA; broken images were left out of the cache."""
        return torch.from_numpy(concatenate_labels(self._shards, "source_indices"))

    def verify(self) -> None:
        """Read everything and compare digests and labels: as long as the disk takes."""
        for entry, shard in zip(self.index.shards, self._shards, strict=True):
            if shard.digest() != entry.sha256:
                raise _broken_shard(self.folder, entry, self.index, "is damaged (its digest differs)")
            if self.index.num_classes is not None:
                self._check_labels(shard.array("labels"), entry)

    def _require(self, kind: Kind) -> None:
        if self.index.kind != kind:
            raise UserError(
                f"The latent cache '{self.folder}' holds {self.index.kind}, not {kind}",
                "A discrete autoencoder writes tokens, any other writes moments",
            )

    def _locate(
        self, indices: Int64[Tensor, " n"], mirrored: Bool[Tensor, " n"] | None
    ) -> tuple["_Places", Bool[Tensor, " n"]]:
        """Find shards and rows, and see whether what is asked for is there."""
        asked = indices.numpy()
        if len(asked) and (asked.min() < 0 or asked.max() >= len(self)):
            raise IndexError(f"indices {asked.min()} ... {asked.max()} of {len(self)} images")
        if mirrored is None:
            mirrored = torch.zeros(len(asked), dtype=torch.bool)
        elif not self.index.has_mirrored and bool(mirrored.any()):
            raise no_mirrored(self)
        shards = np.searchsorted(self._firsts, asked, side="right") - 1
        return _Places.of(shards, asked - self._firsts[shards]), mirrored

    def _gather(self, name: str, places: "_Places", mirrored: Bool[Tensor, " n"]) -> Shaped[Tensor, "n ..."]:
        """Copy rows of one tensor, and of its mirrored twin where asked for, out of the shards that hold them."""
        flags = mirrored.numpy()
        like = self._shards[places.groups[0][0] if places.groups else 0]
        place = like.places[name]
        if any(self._shards[shard].places[name].shape[1:] != place.shape[1:] for shard, _ in places.groups):
            raise ValueError("latents of several shapes can't be read together")
        rows = np.empty((len(flags), *place.shape[1:]), like.array(name).dtype)
        for shard, chosen in places.groups:
            for flag, tensor in ((False, name), (True, name + MIRRORED)):
                ones = chosen[flags[chosen] == flag]
                if len(ones):
                    rows[ones] = self._shards[shard].array(tensor)[places.rows[ones]]
        return to_tensor(rows, place.dtype)

    def _labels(self, places: "_Places") -> Int64[Tensor, " n"] | None:
        """Read labels; one out of range would end in an error of the embedding that names nothing."""
        if self.index.num_classes is None:
            return None
        labels = np.empty(len(places.rows), np.int64)
        for shard, chosen in places.groups:
            labels[chosen] = self._shards[shard].array("labels")[places.rows[chosen]]
            self._check_labels(labels[chosen], self.index.shards[shard])
        return torch.from_numpy(labels)

    def _check_labels(self, labels: Int64[np.ndarray, " n"], entry: ShardEntry) -> None:
        num_classes = self.index.num_classes or 0
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            what = f"holds label {wrong}, out of range for {num_classes} classes"
            raise _broken_shard(self.folder, entry, self.index, what)


@final
@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where the images of a batch lie."""

    rows: Int64[np.ndarray, " n"]
    """Row of each image in its shard."""

    groups: tuple[tuple[int, Int64[np.ndarray, " _"]], ...]
    """Shard, and which images of the batch lie in it."""

    @classmethod
    def of(cls, shards: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]) -> "_Places":
        """Group images by shard."""
        order = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[order])) + 1
        groups = np.split(order, borders) if len(order) else []
        return cls(rows=rows, groups=tuple((int(shards[group[0]]), group) for group in groups))


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
        what = "is that of a cache" if name == MEASURED else "is not known"
        raise UserError(f"The normalization '{name}' {what}", f"Give {FIXED}0.18215, say")
    try:
        factor = float(name.removeprefix(FIXED))
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"The normalization '{name}' has no positive factor", f"Write it as '{FIXED}0.18215'")
    return Normalization(shift=torch.zeros(num_channels), scale=torch.full((num_channels,), 1.0 / factor))


def no_mirrored(cache: LatentCache) -> UserError:
    """Say that mirror images were asked for and are not there."""
    return UserError(
        f"The latent cache '{cache.folder}' holds no mirror images", "Train with --no-flip, or encode with --mirror"
    )


def _broken_shard(folder: Path, entry: ShardEntry, index: CacheIndex, what: str) -> UserError:
    return UserError(f"Shard '{folder / entry.file}' {what}", f"Rebuild it: {index.rebuild_command(folder)}")


def _check_shard(shard: Shard, entry: ShardEntry, index: CacheIndex) -> None:
    """Hold a shard's size, tensors and digest against the index; a BrokenShardError says what does not fit."""
    if shard.num_bytes != entry.num_bytes:
        raise BrokenShardError(f"has {shard.num_bytes} bytes instead of {entry.num_bytes}")
    if shard.note.get("sha256") != entry.sha256:
        raise BrokenShardError("is not the one that the index names (its digest differs)")
    found = {name: (place.dtype, place.shape) for name, place in shard.places.items()}
    if found != expected_tensors(index, entry):
        raise BrokenShardError(f"holds other tensors than the index says ({', '.join(found)})")
