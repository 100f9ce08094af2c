"""Batches of images for training and for evaluation.

Which images a batch holds, and how they are cropped, follows from (seed, step) alone: not from workers, not from where
a run was resumed. Broken images are replaced or left out and named, up to 1% of the data.
"""

import atexit
import contextlib
import multiprocessing
import signal
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eqvae.errors import UserError, printable
from eqvae.images.bands import Crop, Picture
from eqvae.images.decoding import BrokenImage, BrokenImageError, adm_crop, ldm_random_crop, to_images
from eqvae.images.sizes import Buckets, ImageSize, bucket_at, to_buckets
from eqvae.images.sources import ImageSource
from eqvae.runtime.journal import say

MAX_BROKEN_PERCENT = 1
"""More distinct broken images than this share of the data end the run."""

_ORDER, _CROP = 0, 1  # what a random stream is for


@final
@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one step."""

    crops: Shaped[Tensor, "n h w k"]
    """0 ... 255, on the CPU, as bytes: a quarter of what floats would take on their way to an accelerator. Pictures of
    more than 8 bits are float32, not rounded."""

    indices: tuple[int, ...]
    """Where each image stands in its source."""

    broken: tuple[BrokenImage, ...]
    """Images found broken while making this batch, and not before in this run."""

    @cached_property
    def images(self) -> Float[Tensor, "n k h w"]:
        """x, in [-1, 1], on the CPU."""
        return to_images(self.crops.numpy())


@final
@dataclass(frozen=True, kw_only=True)
class _Crops:
    """What a worker hands over: an array, which goes through a pipe, where a tensor would need shared memory."""

    crops: Shaped[np.ndarray, "n h w k"]
    indices: tuple[int, ...]
    broken: tuple[tuple[int, BrokenImage], ...]
    """With their indices."""

    small: tuple[int, int, int] | None
    """Index and size in px of an image that is smaller than its crop, and enlarged for it."""


@final
@dataclass(frozen=True, kw_only=True)
class _RandomCrops(Dataset[_Crops]):
    """Step to the random crops of its batch."""

    source: ImageSource
    buckets: Buckets
    batch_size: int
    seed: int
    flip: bool
    rows: Sequence[int]

    def __getitem__(self, step: int) -> _Crops:
        members = tuple(len(bucket.members) for bucket in self.buckets)
        which, number = bucket_at(step, members, self.seed)
        bucket = self.buckets[which]
        size = bucket.size_at(number)

        def index_of(position: int) -> int:
            epoch, place = divmod(number * self.batch_size + position, members[which])
            return bucket.members[_order(members[which], self.seed, epoch, which)[place]]

        def crop(image: Picture, position: int) -> Crop:
            random = np.random.default_rng((self.seed, _CROP, step, self.rows[position]))
            return ldm_random_crop(image, size, random, flip=self.flip)

        indices = map(index_of, self.rows)
        return _read_crops(self.source, indices, crop, size, replaces_broken=True)


@final
@dataclass(frozen=True, kw_only=True)
class _CentreCrops(Dataset[_Crops]):
    """Step to the centre crops of its images; broken ones are left out."""

    source: ImageSource
    sizes: Sequence[ImageSize]
    parts: Sequence[Sequence[int]]

    def __getitem__(self, step: int) -> _Crops:
        size = self.sizes[step]

        def crop(image: Picture, position: int) -> Crop:
            del position
            return adm_crop(image, size)

        return _read_crops(self.source, self.parts[step], crop, size, replaces_broken=False)


def _read_crops(
    source: ImageSource,
    visited: Iterable[int],
    crop: Callable[[Picture, int], Crop],
    size: ImageSize,
    *,
    replaces_broken: bool,
) -> _Crops:
    """Read and crop some images; broken ones give way to the next good one of the source, or are left out.

    It stops as soon as more are broken than may be.
    """
    limit = _max_broken(len(source))
    arrays: list[Crop] = []
    indices: list[int] = []
    broken: dict[int, BrokenImage] = {}
    small: tuple[int, int, int] | None = None
    for position, index in enumerate(visited):
        image = _read(source, index, broken)
        while image is None and replaces_broken and len(broken) <= limit:
            index = (index + 1) % len(source)
            image = _read(source, index, broken)
        if image is not None:
            arrays.append(crop(image, position))
            indices.append(index)
            is_small = image.height < size.height or image.width < size.width
            small = (index, *image.size) if small is None and is_small else small
        elif len(broken) > limit:
            break
    nothing = (0, *size, source.pixels.channels)
    crops = np.stack(arrays) if arrays else np.empty(nothing, np.uint8)
    return _Crops(crops=crops, indices=tuple(indices), broken=tuple(broken.items()), small=small)


def _read(source: ImageSource, index: int, broken: dict[int, BrokenImage]) -> Picture | None:
    """Decode an image; None where it is broken, which is then on record."""
    if index in broken:
        return None
    try:
        return source.read(index)
    except BrokenImageError as error:
        broken[index] = error.image
        return None


def training_batches(
    source: ImageSource,
    *,
    image_size_px: int | ImageSize | Buckets,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_steps: int,
    flip: bool = True,
    rows: Sequence[int] | None = None,
    num_workers: int,
) -> Generator[ImageBatch, None, None]:
    """Yield the batches of steps `first_step` ... `first_step + num_steps - 1`, each of one bucket.

    A bucket's images follow a permutation for each epoch, drawn from (seed, epoch); epochs run on inside a batch. A
    broken image is replaced by the next good one of the source, until more than 1% are found broken: then a `UserError`
    is raised.
    A resumed run goes on at `first_step` with the batches that the whole run would have had (of `broken` alone, each
    run keeps its own account). `num_workers` processes decode ahead; batches do not depend on them. `rows` says which
    images of each batch to read, where other processes read the rest.
    """
    steps = _RandomCrops(
        source=source, buckets=to_buckets(image_size_px, len(source)), batch_size=batch_size, seed=seed, flip=flip,
        rows=range(batch_size) if rows is None else rows,
    )  # fmt: skip
    yield from _batches(steps, range(first_step, first_step + num_steps), source, num_workers)


def evaluation_batches(
    source: ImageSource,
    *,
    image_size_px: int | ImageSize,
    batch_size: int,
    num_images: int | None,
    num_workers: int,
    spread: bool = False,
    part: slice = slice(None),
) -> Iterator[ImageBatch]:
    """Yield centre crops of the first `num_images` images in order, or of as many at equal distances.

    The first ones of a folder tree are often all of one class. Broken images are left out; no batch is empty. `part`
    says which of the batches to read, where other processes read the rest.
    """
    num_visited = len(source) if num_images is None else min(num_images, len(source))
    visited: Sequence[int] = range(num_visited)
    if spread:
        visited = [position * len(source) // num_visited for position in visited]
    parts = [visited[start : start + batch_size] for start in range(0, num_visited, batch_size)]
    pending: ImageBatch | None = None
    for batch in encoding_batches(source, image_size_px=image_size_px, parts=parts[part], num_workers=num_workers):
        # A batch is held back until the next one is known: one without images hands it its broken names.
        if pending is None or not pending.indices:
            pending = replace(batch, broken=(pending.broken if pending else ()) + batch.broken)
        elif not batch.indices:
            pending = replace(pending, broken=pending.broken + batch.broken)
        else:
            yield pending
            pending = batch
    if pending is not None:
        yield pending


def encoding_batches(
    source: ImageSource,
    *,
    image_size_px: int | ImageSize | Sequence[ImageSize],
    parts: Sequence[Sequence[int]],
    num_broken: int = 0,
    num_workers: int,
) -> Generator[ImageBatch, None, None]:
    """Yield the centre crops of given images, one batch for each part; broken images are left out.

    A part may have a size of its own. `num_broken` counts those that an earlier session found.
    """
    sizes = [ImageSize.of(image_size_px)] * len(parts) if isinstance(image_size_px, int | ImageSize) else image_size_px
    steps = _CentreCrops(source=source, sizes=sizes, parts=parts)
    yield from _batches(steps, range(len(parts)), source, num_workers, num_broken)


def _batches(
    steps: Dataset[_Crops], order: Sequence[int], source: ImageSource, num_workers: int, num_broken: int = 0
) -> Iterator[ImageBatch]:
    """Run steps in order, ahead of their use where there are workers, and hold the broken images to the limit."""
    broken: dict[int, BrokenImage] = {}
    for read in _load(steps, order, num_workers):
        found = {index: image for index, image in read.broken if index not in broken}
        broken |= found
        if broken:
            check_broken(source.name, len(source), num_broken + len(broken), next(iter(broken.values())))
        if read.small is not None and not source.is_small_said:
            source.is_small_said = True
            index, width, height = read.small
            side = f"{ImageSize(*read.crops.shape[1:3])} px"
            say(f"'{source.label(index)}' has {width} x {height} px: images smaller than {side} are enlarged to them")
        yield ImageBatch(crops=torch.from_numpy(read.crops), indices=read.indices, broken=tuple(found.values()))


def check_broken(source_name: str, num_images: int, num_broken: int, first: BrokenImage | str) -> None:
    """Refuse data of which more than 1% is broken."""
    if num_broken > _max_broken(num_images):
        raise UserError(
            f"{num_broken} of {num_images} images of '{printable(source_name)}' are broken so far, more than "
            f"{MAX_BROKEN_PERCENT}%; the first is {first}",
            "Mend or remove them",
        )


def _load(steps: Dataset[_Crops], order: Sequence[int], num_workers: int) -> Iterator[_Crops]:
    """Iterate a DataLoader without its warnings and without its draw from PyTorch's global random state."""
    with warnings.catch_warnings():
        # More workers than cores are the user's choice; and forked workers only read and decode.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        loader = DataLoader(
            steps,
            batch_size=None,
            sampler=order,
            num_workers=num_workers,
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        workers_before = multiprocessing.active_children()
        crops = iter(loader)
    # A run that ends in an error may leave its workers waiting, and Python's own SIGTERM at exit does not move them.
    _workers.update(set(multiprocessing.active_children()).difference(workers_before))
    return crops


_workers: "weakref.WeakSet[multiprocessing.process.BaseProcess]" = weakref.WeakSet()


@atexit.register
def _kill_workers() -> None:
    for worker in list(_workers):
        with contextlib.suppress(ValueError):  # it has been closed
            worker.kill()


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the run's process decides when workers end."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _max_broken(num_images: int) -> int:
    return num_images * MAX_BROKEN_PERCENT // 100


@lru_cache(maxsize=2)
def _order(num_images: int, seed: int, epoch: int, bucket: int) -> Int64[np.ndarray, " num_images"]:
    """Permute the places of a bucket's images in an epoch."""
    # NumPy takes a key of three numbers for one with a zero behind them: the only bucket is ordered as ever.
    return np.random.default_rng((seed, _ORDER, epoch, bucket)).permutation(num_images)
