"""Reading latents in random order for training, against one file for each image behind a DataLoader."""

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import Turn, Variant, Work
from benchmarks.plain_training import SEED, FilePerImage, random_cache
from eqvae.generators.recipes import PUBLISHED_LATENTS
from eqvae.latents.batches import training_batches
from eqvae.runtime.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class Reader(Work):
    """Reading latents of 32 x 32 x 4 for training, against one file for each image behind a DataLoader."""

    unit = "image"

    num_images: int = 8192
    """In the cache, and in files."""

    batch_size: int = 256
    """Latents of a batch."""

    num_batches: int = 30
    """Of a turn."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        ahead = {f"ours, {threads} threads ahead": threads for threads in (0, 1, 2)}
        return {"file per image": Variant(self.files)} | {
            name: Variant(lambda folder, threads=threads: self.ours(folder, threads)) for name, threads in ahead.items()
        }

    @property
    def bytes_per_unit(self) -> float:
        """Mean and deviation in float16, and the sample in float32."""
        return math.prod(PUBLISHED_LATENTS.shape) * (2 * 2 + 4)

    def files(self, folder: Path) -> Turn:
        """Read latents and labels from files of their own."""
        latents = torch.randn(self.num_images, *PUBLISHED_LATENTS.shape, generator=generator_for(SEED))
        data = FilePerImage(folder, latents, PUBLISHED_LATENTS.num_classes)

        def take_turn() -> dict[str, Any]:
            batches = DataLoader(data, self.batch_size, shuffle=True, drop_last=True)
            return {"units": sum(len(labels) for _, labels in islice(batches, self.num_batches))}

        return take_turn

    def ours(self, folder: Path, num_threads: int) -> Turn:
        """Read a cache: flips, samples of the posterior, normalized."""
        cache = random_cache(folder / "cache", PUBLISHED_LATENTS, self.num_images)

        def take_turn() -> dict[str, Any]:
            batches = training_batches(
                cache, batch_size=self.batch_size, seed=SEED, num_steps=self.num_batches, num_threads=num_threads
            )
            return {"units": sum(len(batch.latents) for batch in batches)}

        return take_turn
