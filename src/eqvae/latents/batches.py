"""Batches of cached latents for training: which images, flips and noise follows from (seed, step, position) alone."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.images.sizes import bucket_at
from eqvae.latents.cache import LatentBatch, LatentCache, no_mirrored
from eqvae.runtime.seeds import generator_for

_ORDER, _FLIP_AND_NOISE = 0x6F72646572, 0x6E6F697365  # what a random stream is for; no step is as large


@final
@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One process's part of the global batches."""

    cache: LatentCache
    members: tuple[Int64[np.ndarray, " _"], ...]
    """The images of each shape."""

    batch_size: int
    seed: int
    flip: bool
    sample: bool
    rank: int
    count: int

    def read(self, step: int) -> LatentBatch:
        """Read this process's latents or tokens of one step."""
        drawn = self._draw(step)
        if self.cache.index.kind == "tokens":
            return self.cache.read_tokens(drawn.indices, mirrored=drawn.mirrored)
        return self.cache.read(drawn.indices, mirrored=drawn.mirrored, noise=drawn.noise)

    def _draw(self, step: int) -> "_Drawn":
        which, turn = bucket_at(step, tuple(shape.num_images for shape in self.cache.shapes), self.seed)
        shape = self.cache.shapes[which]
        own = self.batch_size // self.count
        positions = range(self.rank * own, (self.rank + 1) * own)
        generator = generator_for(self.seed, step, _FLIP_AND_NOISE)
        # A number for each position of the global batch: the seed of its noise, and a high bit, which the generator
        # does not use, for the flip.
        numbers = torch.randint(2**62, (self.batch_size,), generator=generator)[positions.start : positions.stop]
        noise = torch.empty(own, self.cache.index.latent_channels, shape.height, shape.width) if self.sample else None
        if noise is not None:
            for row, number in zip(noise, numbers.tolist(), strict=True):
                row.normal_(generator=generator.manual_seed(number))
        return _Drawn(
            indices=torch.from_numpy(self._images(which, turn, positions)),
            mirrored=(numbers >> 40 & 1).bool() if self.flip else torch.zeros(own, dtype=torch.bool),
            noise=noise,
        )

    def _images(self, which: int, turn: int, positions: range) -> Int64[np.ndarray, " n"]:
        """Look up the images at some positions of a shape's batch; epochs run on inside a batch."""
        num_images = self.cache.shapes[which].num_images
        epochs, places = np.divmod(turn * self.batch_size + np.arange(positions.start, positions.stop), num_images)
        images = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs):
            images[epochs == epoch] = _order(num_images, self.seed, int(epoch), which)[places[epochs == epoch]]
        return self.members[which][images]


@final
@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """The chance in one process's part of a step."""

    indices: Int64[Tensor, " n"]
    mirrored: Bool[Tensor, " n"]
    noise: Float[Tensor, "n c h w"] | None


def training_batches(
    cache: LatentCache,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_steps: int,
    flip: bool = True,
    sample: bool = True,
    rank: int = 0,
    count: int = 1,
    num_threads: int = 1,
) -> Generator[LatentBatch, None, None]:
    """Yield this process's part of the global batches of steps `first_step` ... `first_step + num_steps - 1`.

    A batch is of one shape, which is drawn as often as it has images. These follow a permutation for each epoch, drawn
    from (seed, epoch); epochs run on inside a batch. Image, flip and noise at a position of the global batch are the
    same for any number of processes.

    With `flip` a mirror image comes with probability 1/2; without `sample` a posterior gives its mean. `rank` takes the
    rank-th of `count` consecutive parts. `num_threads` read ahead of the consumer, 0 when asked, and change nothing.
    """
    if batch_size < 1 or batch_size % count:
        raise UserError(
            f"--batch-size {batch_size} can't be split over {count} processes", f"Choose a multiple of {count}"
        )
    if flip and not cache.index.has_mirrored:
        raise no_mirrored(cache)
    plan = _Plan(
        cache=cache, members=tuple(map(cache.members, range(len(cache.shapes)))), batch_size=batch_size, seed=seed,
        flip=flip, sample=sample and cache.index.has_std, rank=rank, count=count,
    )  # fmt: skip
    yield from _ahead(plan.read, range(first_step, first_step + num_steps), num_threads)


def _ahead(read: Callable[[int], LatentBatch], steps: range, num_threads: int) -> Generator[LatentBatch, None, None]:
    """Read steps in order, ahead of their use where there are threads."""
    if num_threads == 0:
        yield from map(read, steps)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="latents")
    try:
        pending: deque[Future[LatentBatch]] = deque()
        for step in steps:
            pending.append(pool.submit(read, step))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=2)
def _order(num_images: int, seed: int, epoch: int, shape: int) -> Int64[np.ndarray, " num_images"]:
    """Permute the images of a shape in an epoch."""
    key = (seed, epoch, _ORDER, shape) if shape else (seed, epoch, _ORDER)  # of the only shape as ever
    return np.random.default_rng(key).permutation(num_images)
