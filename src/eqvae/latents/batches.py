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
from eqvae.latents.cache import LatentBatch, LatentCache, no_mirrored
from eqvae.runtime.seeds import generator_for

_ORDER, _FLIP_AND_NOISE = 0x6F72646572, 0x6E6F697365  # what a random stream is for; no step is as large


@final
@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One process's part of the global batches."""

    cache: LatentCache
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
        own = self.batch_size // self.count
        positions = range(self.rank * own, (self.rank + 1) * own)
        generator = generator_for(self.seed, step, _FLIP_AND_NOISE)
        # A number for each position of the global batch: the seed of its noise, and a high bit, which the generator
        # does not use, for the flip.
        numbers = torch.randint(2**62, (self.batch_size,), generator=generator)[positions.start : positions.stop]
        noise = torch.empty(own, *self.cache.latent_shape) if self.sample else None
        if noise is not None:
            for row, number in zip(noise, numbers.tolist(), strict=True):
                row.normal_(generator=generator.manual_seed(number))
        return _Drawn(
            indices=torch.from_numpy(self._images(step, positions)),
            mirrored=(numbers >> 40 & 1).bool() if self.flip else torch.zeros(own, dtype=torch.bool),
            noise=noise,
        )

    def _images(self, step: int, positions: range) -> Int64[np.ndarray, " n"]:
        """Look up the images at some positions of a step's batch; epochs run on inside a batch."""
        num_images = len(self.cache)
        epochs, places = np.divmod(step * self.batch_size + np.arange(positions.start, positions.stop), num_images)
        images = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs):
            images[epochs == epoch] = _order(num_images, self.seed, int(epoch))[places[epochs == epoch]]
        return images


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

    Images follow a permutation for each epoch, drawn from (seed, epoch); epochs run on inside a batch. Image, flip and
    noise at a position of the global batch are the same for any number of processes.

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
        cache=cache, batch_size=batch_size, seed=seed, flip=flip, sample=sample and cache.index.has_std,
        rank=rank, count=count,
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
def _order(num_images: int, seed: int, epoch: int) -> Int64[np.ndarray, " num_images"]:
    """Permute the images of an epoch."""
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(num_images)
