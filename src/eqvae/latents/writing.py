"""The latent cache, written: what is kept of an autoencoder's answer, one finished shard, and the index over all."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from eqvae.artifacts.names import shard_name
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError
from eqvae.images.bands import RGB, Pixels
from eqvae.images.sizes import ImageSize
from eqvae.latents.index import PREPROCESSING, CacheIndex, Kind, LatentShape, MomentSums, ShardEntry, expected_tensors
from eqvae.latents.shards import DTYPES, MIRRORED, BrokenShardError, Shard, write_shard
from eqvae.runtime.device import Precision, autocast
from eqvae.runtime.journal import installed_version

_MAX_INT16_CODES = 2**15

MomentsDtype = Literal["float16", "bfloat16", "float32"]


@final
@dataclass(frozen=True, kw_only=True)
class Coding:
    """Moments or tokens."""

    kind: Kind

    dtype: str
    """Of what is stored, a key of `shards.DTYPES`."""

    codebook_size: int | None = None
    """Of tokens; None for moments."""


def coding_of(autoencoder: Autoencoder, dtype: MomentsDtype) -> Coding:
    """Decide what is kept. Here and in `encode_images` alone a discrete autoencoder differs from the others."""
    if isinstance(autoencoder, DiscreteAutoencoder):
        size = autoencoder.codebook_size
        return Coding(kind="tokens", dtype="int16" if size <= _MAX_INT16_CODES else "int32", codebook_size=size)
    return Coding(kind="moments", dtype=dtype)


def encode_images(autoencoder: Autoencoder, x: Float[Tensor, "n k h w"]) -> dict[str, Shaped[Tensor, "n ..."]]:
    """Encode images to what is kept of them."""
    posterior = autoencoder.encode(x)
    if isinstance(autoencoder, DiscreteAutoencoder):
        return {"tokens": autoencoder.quantize(posterior.mean).tokens}
    kept = {"mean": posterior.mean.float()}
    if posterior.log_variance is not None:
        kept["std"] = torch.exp(0.5 * posterior.log_variance.float())
    return kept


@torch.inference_mode()
def encode_crops(
    autoencoder: Autoencoder, crops: Shaped[Tensor, "n h w k"], device: torch.device, precision: Precision, mirror: bool
) -> dict[str, Shaped[Tensor, "n ..."]]:
    """Encode one batch of crops, and their mirror images."""
    count = len(crops)
    if count == 0:
        crops = crops.new_zeros(1, *crops.shape[1:])
    if device.type == "cuda":
        crops = crops.pin_memory()
    # Bytes are laid out as channels-last already, and so are the images made of them.
    x = crops.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with autocast(device, precision):
        kept = encode_images(autoencoder, x)
        if mirror:
            flipped = x.flip(-1).contiguous(memory_format=torch.channels_last)
            kept |= {name + MIRRORED: values for name, values in encode_images(autoencoder, flipped).items()}
    return {name: values[:count] for name, values in kept.items()}


def to_stored(name: str, values: Shaped[Tensor, "n ..."], coding: Coding) -> Shaped[Tensor, "n ..."]:
    """Bring values to the type in which they are stored, and refuse those that it can't hold."""
    if coding.kind == "tokens":
        size = coding.codebook_size or 0
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise UserError(f"Tokens {int(values.min())} ... {int(values.max())} are outside a codebook of {size}")
        return values.to(DTYPES[coding.dtype]).cpu()
    if not bool(values.isfinite().all()):
        raise UserError(
            f"The latents hold NaN or infinite values ({name}): the autoencoder has diverged, or needs more precision",
            "Try --precision fp32, or an earlier checkpoint",
        )
    stored = values.to(DTYPES[coding.dtype])
    if not bool(stored.isfinite().all()):
        raise UserError(
            f"The latents reach {float(values.abs().max()):.3g} ({name}), which {coding.dtype} can't hold",
            "Use --dtype bfloat16 or float32 in another --out",
        )
    return stored.cpu()


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that determines a cache, whichever process writes which shard."""

    coding: Coding
    visited_by_size: tuple[tuple[ImageSize, Sequence[int]], ...]
    """Images of the data to visit for each size of crops, broken ones included."""
    stride: int
    latent_channels: int
    autoencoder: str
    fingerprint: str
    encoder_fingerprint: str
    data: str
    data_fingerprint: str
    class_names: tuple[str, ...] | None
    classes: Int64[np.ndarray, " n"] | None = None
    """Of all images of the data."""
    image_column: str | None = None
    pixels: Pixels = RGB
    mirror: bool
    precision: str
    shard_size: int
    command: str
    """See `CacheIndex.command`."""

    @cached_property
    def shards(self) -> list["PlannedShard"]:
        """Cut the images of each size into shards."""
        return [
            PlannedShard(shape, size, visited[start : start + self.shard_size])
            for shape, (size, visited) in enumerate(self.visited_by_size)
            for start in range(0, len(visited), self.shard_size)
        ]

    @property
    def num_shards(self) -> int:
        """Count the shards."""
        return len(self.shards)

    @property
    def num_visited(self) -> int:
        """Images of the data to visit, broken ones included."""
        return sum(len(visited) for _, visited in self.visited_by_size)

    @property
    def version(self) -> int:
        """Of the format: older readers know one square size."""
        (size, _), *others = self.visited_by_size
        return 2 if others or not size.is_square else 1

    def path(self, folder: Path, number: int) -> Path:
        """Name the file of one shard."""
        return folder / shard_name(number)

    def note(self, number: int) -> dict[str, Any]:
        """Say in a shard's header what made it: only a shard that says just this is kept on resuming."""
        planned = self.shards[number]
        return {
            "version": self.version,
            "kind": self.coding.kind,
            "dtype": self.coding.dtype,
            "image_size_px": planned.size.written(),
            "fingerprint": self.fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "num_classes": None if self.class_names is None else len(self.class_names),
            "mirror": self.mirror,
            "precision": self.precision,
            "first_visited": planned.visited[0],
            "num_visited": len(planned.visited),
        }


class PlannedShard(NamedTuple):
    """One shard of a cache, before it is written."""

    shape: int
    """A number of the cache's shapes."""

    size: ImageSize
    """Of the crops."""

    visited: Sequence[int]
    """Images of the data."""


def finish_shard(
    folder: Path,
    recipe: Recipe,
    number: int,
    kept: dict[str, Shaped[Tensor, "n ..."]],
    *,
    source_indices: Sequence[int],
    labels: Sequence[int] | None,
    broken: Sequence[str],
) -> Path:
    """Convert, check, sum and write one shard."""
    tensors = {name: to_stored(name, values, recipe.coding) for name, values in kept.items()}
    note = recipe.note(number) | {"broken": list(broken)}
    if recipe.coding.kind == "moments":
        sums = [
            MomentSums.of(tensors["mean" + suffix], tensors.get("std" + suffix))
            for suffix in ("", MIRRORED)
            if "mean" + suffix in tensors
        ]
        note["sums"] = vars(reduce(add, sums))
    tensors["source_indices"] = torch.tensor(source_indices, dtype=torch.int64)
    if labels is not None:
        tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
    path = recipe.path(folder, number)
    write_shard(path, tensors, note)
    return path


def open_whole_shard(path: Path, recipe: Recipe, number: int) -> Shard | None:
    """Open a shard that an earlier session left."""
    try:
        shard = Shard(path)
    except BrokenShardError:
        return None
    expected = recipe.note(number)
    is_ours = {name: shard.note.get(name) for name in expected} == expected
    if not is_ours or shard.digest() != shard.note.get("sha256"):
        return None
    if recipe.classes is not None and "labels" in shard.places:  # labels may have been mended since
        classes = recipe.classes[shard.array("source_indices")]
        return shard if np.array_equal(classes, shard.array("labels")) else None
    return shard


def collect_index(folder: Path, recipe: Recipe) -> CacheIndex:
    """Put the index together from the headers of all shards, which must be there."""
    entries: list[ShardEntry] = []
    shards = []
    for number in range(recipe.num_shards):
        path = recipe.path(folder, number)
        try:
            shard = Shard(path)
        except BrokenShardError as error:
            raise UserError(f"Shard '{path}' {error}", "Run the same command again") from None
        first = entries[-1].first + entries[-1].count if entries else 0
        count = shard.places["source_indices"].shape[0]
        entries.append(
            ShardEntry(
                file=path.name, first=first, count=count, sha256=shard.note["sha256"], num_bytes=shard.num_bytes,
                shape=recipe.shards[number].shape,
            )
        )  # fmt: skip
        shards.append(shard)
    num_images = sum(entry.count for entry in entries)
    if num_images == 0:
        raise UserError(f"'{recipe.data}' holds no image that can be read", "Check --data")
    shapes = _count_shapes(entries, recipe)
    main = max(shapes, key=lambda shape: shape.num_images)
    sums = [MomentSums.from_plain(shard.note["sums"]) for shard in shards if "sums" in shard.note]
    index = CacheIndex(
        version=recipe.version,
        kind=recipe.coding.kind,
        image_size_px=main.height * recipe.stride,
        stride=recipe.stride,
        latent_channels=recipe.latent_channels,
        latent_height=main.height,
        latent_width=main.width,
        codebook_size=recipe.coding.codebook_size,
        num_images=num_images,
        num_broken=sum(len(shard.note["broken"]) for shard in shards),
        num_classes=None if recipe.class_names is None else len(recipe.class_names),
        class_names=recipe.class_names,
        image_column=recipe.image_column,
        image_channels=recipe.pixels.channels,
        white=recipe.pixels.range.white,
        black=recipe.pixels.range.black,
        has_mirrored=recipe.mirror,
        has_std="std" in shards[0].places,
        dtype=recipe.coding.dtype,
        statistics=reduce(add, sums).measures() if sums else None,
        autoencoder=recipe.autoencoder,
        fingerprint=recipe.fingerprint,
        encoder_fingerprint=recipe.encoder_fingerprint,
        preprocessing=PREPROCESSING,
        data=recipe.data,
        data_fingerprint=recipe.data_fingerprint,
        shard_size=recipe.shard_size,
        command=recipe.command,
        eqvae_version=installed_version("eqvae") or "unknown",
        shards=tuple(entries),
        shapes=tuple(shapes) if recipe.version > 1 else (),
    )
    for shard, entry in zip(shards, entries, strict=True):
        found = {name: (place.dtype, place.shape) for name, place in shard.places.items()}
        if found != expected_tensors(index, entry):
            raise UserError(
                f"Shard '{shard.path}' holds other tensors than the rest ({json.dumps(found)})",
                "Remove it and run the same command again",
            )
    return index


def _count_shapes(entries: Sequence[ShardEntry], recipe: Recipe) -> list[LatentShape]:
    """List the shapes, each with its images that are there."""
    counts = [0] * len(recipe.visited_by_size)
    for entry in entries:
        counts[entry.shape] += entry.count
    return [
        LatentShape(height=size.height // recipe.stride, width=size.width // recipe.stride, num_images=count)
        for (size, _), count in zip(recipe.visited_by_size, counts, strict=True)
    ]
