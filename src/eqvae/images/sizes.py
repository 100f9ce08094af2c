"""Sizes of crops: a square, a rectangle, several resolutions, buckets of aspects; and which image is cut to which.

Images of a bucket are cut to one aspect, at one or several resolutions that take turns. Which bucket a step's batch is
of follows from (seed, step) alone, each as often as it has images.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Int64

from eqvae.errors import UserError, printable
from eqvae.images.decoding import BrokenImageError
from eqvae.images.sources import ImageSource, counted
from eqvae.runtime.processes import Processes

_TURNS = 2  # what a random stream is for; the loader has 0 and 1

_MAX_ASPECT = 2
"""Longer side over shorter one, of `--aspect-buckets`."""

_STEPS_PER_SIDE = 8
"""Sides of buckets differ by an eighth of the resolution, or by as much as the latents need."""

_WRITTEN = re.compile(r"(\d{1,6})(?:x(\d{1,6}))?")


class ImageSize(NamedTuple):
    """Height and width of a crop, in px."""

    height: int
    width: int

    @classmethod
    def of(cls, size: "int | ImageSize") -> "ImageSize":
        """Take a number for the side of a square."""
        return size if isinstance(size, ImageSize) else cls(size, size)

    def __str__(self) -> str:
        """Write it as `--image-size` reads it: `256`, or `192x256` for height x width."""
        return str(self.width) if self.is_square else f"{self.height}x{self.width}"

    @property
    def is_square(self) -> bool:
        return self.height == self.width

    @property
    def num_pixels(self) -> int:
        return self.height * self.width

    def written(self) -> int | str:
        """Write it as JSON has it: a square's side is a number."""
        return self.width if self.is_square else str(self)


@final
@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Images that are cut to one aspect."""

    sizes: tuple[ImageSize, ...]
    """One for each resolution; they take turns."""

    members: Sequence[int]
    """Where the images stand in their source, in its order."""

    def size_at(self, number: int) -> ImageSize:
        """The size of its batch, or of its image, of this number."""
        return self.sizes[number % len(self.sizes)]


Buckets = tuple[Bucket, ...]


def read_sizes(image_size: int | str) -> tuple[ImageSize, ...]:
    """Read `--image-size`: `256`, `192x256` (height x width), or several of them with commas between."""
    sizes = []
    for word in str(image_size).split(","):
        written = _WRITTEN.fullmatch(word.strip())
        if written is None and not isinstance(image_size, int):
            mend = "Write 256, 192x256 for height x width, or several as in 128,192,256"
            raise UserError(f"--image-size '{printable(str(image_size))[:50]}' is no size", mend)
        height, width = (image_size, None) if written is None else written.groups()
        size = ImageSize(int(height), int(height if width is None else width))
        if min(size) < 1:
            raise UserError(f"--image-size is {image_size}", "It must be at least 1")
        if size in sizes:
            raise UserError(f"--image-size names {size} twice", "Leave one out")
        sizes.append(size)
    return tuple(sizes)


def write_sizes(sizes: Sequence[ImageSize]) -> int | str:
    """Write what `read_sizes` reads, in one way only."""
    return sizes[0].written() if len(sizes) == 1 else ",".join(map(str, sizes))


def one_size(image_size: int | str) -> ImageSize:
    """Read a single size."""
    first, *others = read_sizes(image_size)
    if others:
        raise UserError(f"--image-size {image_size} names several sizes", "Give one")
    return first


def square_px(image_size: int | str) -> int:
    """Read the side of a square."""
    size = one_size(image_size)
    if not size.is_square:
        raise UserError(f"--image-size {size} is no square", "Choose one side, in px")
    return size.width


def largest(sizes: Sequence[ImageSize]) -> ImageSize:
    """The one of most pixels."""
    return max(sizes, key=lambda size: size.num_pixels)


def bucket_sizes(sizes: Sequence[ImageSize], *, aspect_buckets: bool, unit_px: int) -> list[tuple[ImageSize, ...]]:
    """List the sizes of each bucket, from the highest aspect to the widest; those of one aspect share a bucket.

    With `aspect_buckets` each resolution has sizes of up to 1:2 with about as many pixels as its square: sides are
    multiples of `unit_px`, and of an eighth of the resolution where that is more.
    """
    if not aspect_buckets:
        by_aspect: dict[Fraction, list[ImageSize]] = {}
        for size in sizes:
            by_aspect.setdefault(Fraction(size.width, size.height), []).append(size)
        return [tuple(by_aspect[aspect]) for aspect in sorted(by_aspect)]
    if not all(size.is_square for size in sizes):
        raise UserError(
            f"--aspect-buckets takes resolutions, and --image-size is {write_sizes(sizes)}", "Give 256, say"
        )
    own = {size: _sizes_of_aspects(size.width, unit_px) for size in sizes}
    finest = own[largest(sizes)]
    return [tuple(min(own[size], key=lambda each: _distance(each, aspect)) for size in sizes) for aspect in finest]


def _sizes_of_aspects(side_px: int, unit_px: int) -> list[ImageSize]:
    """List sizes around a square, the highest first; of those with one short side the one nearest in area."""
    if side_px % unit_px:
        below = max(side_px // unit_px, 1) * unit_px
        raise UserError(
            f"--image-size {side_px} is no multiple of {unit_px}, as sides of buckets are",
            f"Use {below} or {below + unit_px}, for example",
        )
    unit_px *= max(round(side_px / _STEPS_PER_SIDE / unit_px), 1)
    if side_px % unit_px:  # the square itself is always among them
        unit_px = math.gcd(side_px, unit_px)
    wide: dict[int, ImageSize] = {}
    for width in range(side_px + unit_px, 2 * side_px + 1, unit_px):
        height = max(round(side_px**2 / width / unit_px), 1) * unit_px
        size = ImageSize(height, width)
        if height < side_px and width <= _MAX_ASPECT * height:
            others = wide.get(height, size)
            wide[height] = min(others, size, key=lambda each: abs(each.num_pixels - side_px**2))
    wider = sorted(wide.values(), key=lambda size: size.width / size.height)
    return [*(ImageSize(size.width, size.height) for size in reversed(wider)), ImageSize(side_px, side_px), *wider]


def _distance(size: ImageSize, other: ImageSize) -> float:
    """How far two aspects are apart: by the logarithm of their ratio."""
    return abs(math.log(size.width / size.height * other.height / other.width))


def sort_into_buckets(
    source: ImageSource, sizes: Sequence[tuple[ImageSize, ...]], processes: Processes, *, num_images: int | None = None
) -> Buckets:
    """Put each of the first images into the bucket of the nearest aspect; empty buckets are left out.

    Headers are read only where there are several. A picture without a readable one counts as a square.
    """
    num_images = len(source) if num_images is None else num_images
    if len(sizes) == 1:
        return (Bucket(sizes=sizes[0], members=range(num_images)),)
    members: list[list[int]] = [[] for _ in sizes]
    with processes.progress("sizes", total=num_images, unit="image") as progress:
        for index in range(num_images):
            try:
                width, height = source.size(index)
            except BrokenImageError:
                width, height = 1, 1
            distances = [_distance(own[0], ImageSize(height, width)) for own in sizes]
            members[distances.index(min(distances))].append(index)
            if progress is not None:
                progress.advance(1)
    return tuple(Bucket(sizes=own, members=each) for own, each in zip(sizes, members, strict=True) if each)


def to_buckets(sizes: int | ImageSize | Buckets, num_images: int) -> Buckets:
    """Take a size for the bucket of all images."""
    if isinstance(sizes, int | ImageSize):
        return (Bucket(sizes=(ImageSize.of(sizes),), members=range(num_images)),)
    return sizes


def split_by_size(buckets: Buckets) -> Iterator[tuple[ImageSize, Sequence[int]]]:
    """Deal each bucket's images out to its resolutions in turn, so that each image has one size."""
    for bucket in buckets:
        for number, size in enumerate(bucket.sizes):
            if len(own := bucket.members[number :: len(bucket.sizes)]):
                yield size, own


def summarize_buckets(buckets: Buckets) -> dict[str, Any]:
    """Say as part of a record how many images are cut to which sizes; nothing where all become one square."""
    if not _are_many(buckets):
        return {}
    own = [{"sizes": [str(size) for size in each.sizes], "num_images": len(each.members)} for each in buckets]
    return {"buckets": own}


def describe_buckets(buckets: Buckets) -> str:
    """Say the same in one line."""
    if not _are_many(buckets):
        return ""
    parts = [f"{counted(len(each.members), 'image')} at {' and '.join(map(str, each.sizes))}" for each in buckets]
    return f"cut to {', '.join(parts)} px (height x width)"


def _are_many(buckets: Buckets) -> bool:
    return len(buckets) > 1 or len(buckets[0].sizes) > 1 or not buckets[0].sizes[0].is_square


def bucket_at(step: int, counts: tuple[int, ...], seed: int) -> tuple[int, int]:
    """Say which bucket a step's batch is of, and how many batches of it came before.

    In as many steps as there are images each bucket has as many batches as it has images, in an order drawn from
    (seed, which of these rounds).
    """
    if len(counts) == 1:
        return 0, step
    cycle, place = divmod(step, sum(counts))
    order, before = _round_of(counts, seed, cycle)
    bucket = int(order[place])
    return bucket, cycle * counts[bucket] + int(before[place])


@lru_cache(maxsize=2)
def _round_of(
    counts: tuple[int, ...], seed: int, cycle: int
) -> tuple[Int64[np.ndarray, " steps"], Int64[np.ndarray, " steps"]]:
    """Order the batches of one round, and count for each those of its bucket before it."""
    order = np.random.default_rng((seed, _TURNS, cycle)).permutation(np.repeat(np.arange(len(counts)), counts))
    before = np.empty(len(order), np.int64)
    before[np.argsort(order, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return order, before
