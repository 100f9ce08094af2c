"""Batches of images for training and for evaluation.

Which images a batch holds, and how they are cropped, follows from (seed, step) alone: not from workers, not from where
a run was resumed. Broken images are replaced or left out and named, up to 1% of the data.
"""

import atexit
import multiprocessing
import signal
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eqvae.errors import UserError
from eqvae.images.crops import adm_crop, ldm_random_crop, to_images
from eqvae.images.decoding import BrokenImageError
from eqvae.images.sources import ImageSource

MAX_BROKEN_PERCENT = 1
"""More distinct broken images than this share of the data end the run."""

_ORDER, _CROP = 0, 1  # what a random stream is for


@final
@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one step."""

    images: Float[Tensor, "n 3 h w"]
    """x, in [-1, 1], on the CPU."""

    indices: tuple[int, ...]
    """Where each image stands in its source."""

    broken: tuple[str, ...]
    """Names of the images found broken while making this batch, and not before in this run."""


@final
@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """Centre crops as bytes: a quarter of what floats would take on their way to an accelerator."""

    crops: UInt8[Tensor, "n size size 3"]
    """0 ... 255, on the CPU."""

    indices: tuple[int, ...]
    """Where each image stands in its source."""

    broken: tuple[str, ...]
    """Names of the images found broken while making this batch."""


@final
@dataclass(frozen=True, kw_only=True)
class _Crops:
    """What a worker hands over: 8 bits, a quarter of the bytes to send."""

    arrays: tuple[UInt8[np.ndarray, "h w 3"], ...]
    indices: tuple[int, ...]
    broken: tuple[tuple[int, str], ...]
    """Index and name."""


class _Reader:
    """Reads the images of one batch and stops as soon as more are broken than may be."""

    def __init__(self, source: ImageSource, max_broken: int) -> None:
        self.source = source
        self.max_broken = max_broken
        self.broken: dict[int, str] = {}

    def read(self, index: int) -> Image.Image | None:
        """Decode an image; None where it is broken, which is then on record."""
        if index in self.broken:
            return None
        try:
            return self.source.read(index)
        except BrokenImageError:
            self.broken[index] = self.source.label(index)
            return None

    @property
    def has_given_up(self) -> bool:
        """More are broken than may be."""
        return len(self.broken) > self.max_broken


@final
@dataclass(frozen=True, kw_only=True)
class _TrainingSteps(Dataset[_Crops]):
    """Step to the crops of its batch."""

    source: ImageSource
    image_size_px: int
    batch_size: int
    seed: int
    flip: bool

    def __getitem__(self, step: int) -> _Crops:
        reader = _Reader(self.source, _max_broken(len(self.source)))
        arrays, indices = [], []
        for position in range(self.batch_size):
            epoch, place = divmod(step * self.batch_size + position, len(self.source))
            index = int(_order(len(self.source), self.seed, epoch)[place])
            while (image := reader.read(index)) is None and not reader.has_given_up:
                index = (index + 1) % len(self.source)
            if image is None:
                break
            random = np.random.default_rng((self.seed, _CROP, step, position))
            arrays.append(ldm_random_crop(image, self.image_size_px, random, flip=self.flip))
            indices.append(index)
        return _Crops(arrays=tuple(arrays), indices=tuple(indices), broken=tuple(reader.broken.items()))


@final
@dataclass(frozen=True, kw_only=True)
class _EvaluationSteps(Dataset[_Crops]):
    """Step to the crops of its batch, in the source's order."""

    source: ImageSource
    image_size_px: int
    batch_size: int
    num_images: int
    spread: bool

    def __getitem__(self, step: int) -> _Crops:
        positions = range(step * self.batch_size, min((step + 1) * self.batch_size, self.num_images))
        if self.spread:
            return _centre_crops(
                self.source,
                self.image_size_px,
                [position * len(self.source) // self.num_images for position in positions],
            )
        return _centre_crops(self.source, self.image_size_px, positions)


@final
@dataclass(frozen=True, kw_only=True)
class _EncodingSteps(Dataset[_Crops]):
    """Step to the crops of one range of images."""

    source: ImageSource
    image_size_px: int
    parts: Sequence[range]

    def __getitem__(self, step: int) -> _Crops:
        return _centre_crops(self.source, self.image_size_px, self.parts[step])


def _centre_crops(source: ImageSource, image_size_px: int, visited: Sequence[int]) -> _Crops:
    """Read and crop some images; broken ones are left out."""
    reader = _Reader(source, _max_broken(len(source)))
    arrays, indices = [], []
    for index in visited:
        image = reader.read(index)
        if image is not None:
            arrays.append(adm_crop(image, image_size_px))
            indices.append(index)
        elif reader.has_given_up:
            break
    return _Crops(arrays=tuple(arrays), indices=tuple(indices), broken=tuple(reader.broken.items()))


def training_batches(
    source: ImageSource,
    *,
    image_size_px: int,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_steps: int,
    flip: bool = True,
    num_workers: int,
) -> Generator[ImageBatch, None, None]:
    """Yield the batches of steps `first_step` ... `first_step + num_steps - 1`.

    Images follow a permutation for each epoch, drawn from (seed, epoch); epochs run on inside a batch. A broken image
    is replaced by the next good one of the source.

    Args:
        source: At least one image.
        image_size_px: Side of the random crops, see `ldm_random_crop`.
        batch_size: Images of each batch; may exceed the source's.
        seed: Not negative.
        first_step: Where a resumed run goes on; its batches are the ones that the whole run would have had (of
            `broken` alone, each run keeps its own account).
        num_steps: How many batches.
        flip: Mirror half of the crops.
        num_workers: Processes that decode ahead; 0 decodes here. The batches do not depend on it.

    Yields:
        Full batches, until more than 1% of the source's images are found broken: then a `UserError` is raised.
    """
    steps = _TrainingSteps(source=source, image_size_px=image_size_px, batch_size=batch_size, seed=seed, flip=flip)
    yield from _batches(steps, range(first_step, first_step + num_steps), source.name, len(source), num_workers)


def evaluation_batches(
    source: ImageSource,
    *,
    image_size_px: int,
    batch_size: int,
    num_images: int | None,
    num_workers: int,
    spread: bool = False,
) -> Iterator[ImageBatch]:
    """Yield the first `num_images` images in order, or as many spread over the source; broken ones are left out."""
    num_visited = len(source) if num_images is None else min(num_images, len(source))
    steps = _EvaluationSteps(
        source=source, image_size_px=image_size_px, batch_size=batch_size, num_images=num_visited, spread=spread
    )
    num_steps = -(-num_visited // batch_size)
    pending: ImageBatch | None = None
    for batch in _batches(steps, range(num_steps), source.name, len(source), num_workers):
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
    source: ImageSource, *, image_size_px: int, parts: Sequence[range], num_broken: int = 0, num_workers: int
) -> Generator[CropBatch, None, None]:
    """Yield the centre crops of given ranges of images, one batch for each; broken images are left out."""
    steps = _EncodingSteps(source=source, image_size_px=image_size_px, parts=parts)
    for crops, broken in _keep_to_limit(steps, range(len(parts)), source.name, len(source), num_workers, num_broken):
        arrays = np.stack(crops.arrays) if crops.arrays else np.empty((0, image_size_px, image_size_px, 3), np.uint8)
        yield CropBatch(crops=torch.from_numpy(arrays), indices=crops.indices, broken=broken)


def _batches(
    steps: Dataset[_Crops], order: Sequence[int], source_name: str, num_images: int, num_workers: int
) -> Iterator[ImageBatch]:
    """Run steps in order and turn their crops into images."""
    for crops, broken in _keep_to_limit(steps, order, source_name, num_images, num_workers):
        images = to_images(crops.arrays) if crops.arrays else torch.empty(0, 3, 0, 0)
        yield ImageBatch(images=images, indices=crops.indices, broken=broken)


def _keep_to_limit(
    steps: Dataset[_Crops],
    order: Sequence[int],
    source_name: str,
    num_images: int,
    num_workers: int,
    num_broken: int = 0,
) -> Iterator[tuple[_Crops, tuple[str, ...]]]:
    """Run steps in order, ahead of their use where there are workers, and hold the broken images to the limit."""
    broken: dict[int, str] = {}
    for crops in _load(steps, order, num_workers):
        found = {index: name for index, name in crops.broken if index not in broken}
        broken |= found
        if broken:
            check_broken(source_name, num_images, num_broken + len(broken), next(iter(broken.values())))
        yield crops, tuple(found.values())


def check_broken(source_name: str, num_images: int, num_broken: int, first: str) -> None:
    """Refuse data of which more than 1% is broken."""
    if num_broken > _max_broken(num_images):
        raise UserError(
            f"{num_broken} of {num_images} images of '{source_name}' are broken so far, more than "
            f"{MAX_BROKEN_PERCENT}%; the first is '{first}'",
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
    for worker in set(multiprocessing.active_children()).difference(workers_before):
        atexit.register(worker.kill)
    return crops


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the run's process decides when workers end."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _max_broken(num_images: int) -> int:
    return num_images * MAX_BROKEN_PERCENT // 100


@lru_cache(maxsize=2)
def _order(num_images: int, seed: int, epoch: int) -> Int64[np.ndarray, " num_images"]:
    """Permute the indices of an epoch."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(num_images)
