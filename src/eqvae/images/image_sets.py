"""Sets of 8-bit images that are scored: an `.npz` in ADM's layout, a folder, any DATA. None is ever held whole."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from eqvae.artifacts.files import expanded
from eqvae.artifacts.names import SAMPLE_SET
from eqvae.artifacts.sample_sets import IMAGES_KEY, check_header, moments_in, open_array, reading, skip
from eqvae.errors import UserError, printable
from eqvae.images import ImageSource, Pixels, encoding_batches, open_images
from eqvae.images.arrays import count_channels
from eqvae.images.bands import RGB
from eqvae.images.decoding import BrokenImage, BrokenImageError
from eqvae.images.sizes import ImageSize
from eqvae.images.sources import counted
from eqvae.runtime.journal import say
from eqvae.runtime.processes import Processes


@final
class NpzImages:
    """`arr_0` of an `.npz`, streamed out of the archive; nothing is unpickled."""

    def __init__(self, path: Path) -> None:
        """Read the header."""
        self.path, self.name = path, str(path)
        self.broken: list[BrokenImage] = []
        self.shape = check_header(path)
        self.image_size, self.num_channels = ImageSize(*self.shape[1:3]), self.shape[3]

    def __len__(self) -> int:
        return self.shape[0]

    def announce(self, title: str, processes: Processes) -> None:
        """Tell the user in one line what a command is about to read."""
        if processes.is_first:
            channels = "" if self.num_channels == 3 else f", {counted(self.num_channels, 'channel')}"
            say(f"{title}: {counted(len(self), 'image')} of {self.image_size} px{channels}")

    def summary(self) -> dict[str, Any]:
        """Say the same as a record."""
        return {"name": printable(self.name), "num_images": len(self)}

    def batches(
        self, indices: Sequence[int], *, batch_size: int, num_workers: int
    ) -> Iterator[UInt8[Tensor, "n k h w"]]:
        del num_workers
        num_bytes = int(np.prod(self.shape[1:]))
        with reading(self.path), open_array(self.path, IMAGES_KEY) as (file, *_):
            position = 0
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                batch = np.empty((len(chosen), *self.shape[1:]), dtype=np.uint8)
                for row, index in enumerate(chosen):
                    skip(file, (index - position) * num_bytes)
                    content = file.read(num_bytes)
                    if len(content) != num_bytes:
                        raise EOFError("it ends too early")
                    batch[row] = np.frombuffer(content, dtype=np.uint8).reshape(self.shape[1:])
                    position = index + 1
                yield torch.from_numpy(batch).permute(0, 3, 1, 2)


@final
class SourceImages:
    """Images that are decoded as they are read: a folder, parquet, archives."""

    def __init__(self, source: ImageSource, image_size: ImageSize, *, cropped: bool) -> None:
        self.source, self.name, self.image_size, self._cropped = source, source.name, image_size, cropped
        self.num_channels = source.pixels.channels
        self.broken: list[BrokenImage] = []

    def __len__(self) -> int:
        return len(self.source)

    def announce(self, title: str, processes: Processes) -> None:
        """Tell the user in one line what a command is about to read."""
        self.source.announce(title, processes)

    def summary(self) -> dict[str, Any]:
        """Say the same as a record."""
        return self.source.summary()

    def batches(
        self, indices: Sequence[int], *, batch_size: int, num_workers: int
    ) -> Iterator[UInt8[Tensor, "n k h w"]]:
        parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        for batch in encoding_batches(self.source, image_size_px=self.image_size, parts=parts, num_workers=num_workers):
            if batch.broken and not self._cropped:
                raise UserError(f"The sample {batch.broken[0]} cannot be decoded", "Write it again or remove it")
            self.broken.extend(batch.broken)
            if batch.indices:
                crops = batch.crops if batch.crops.dtype == torch.uint8 else batch.crops.round().to(torch.uint8)
                yield crops.permute(0, 3, 1, 2)


ImageSet = NpzImages | SourceImages
"""8-bit images of one size and number of channels, read in order, a batch at a time; `broken` names those left out, as
they are met."""


def open_samples(path: Path) -> ImageSet:
    """Open SAMPLES."""
    path = expanded(path)
    if not path.exists():
        raise UserError(f"Samples '{path}' do not exist", "Give an .npz, an output folder of eqvae sample, or images")
    npz = path / SAMPLE_SET if (path / SAMPLE_SET).is_file() else path
    if npz.suffix == ".npz":
        if moments_in(npz):
            raise UserError(
                f"'{npz}' holds a reference's moments (mu, sigma), not samples alone", "Give it as --reference"
            )
        return NpzImages(npz)
    source = open_images(str(path))
    with contextlib.suppress(BrokenImageError):  # whose header is looked at next
        channels = count_channels(source.content(0))
        source = source if channels is None else source.read_as(Pixels(channels=channels), "SAMPLES")
    return SourceImages(source, _common_size(source), cropped=False)


def open_reference(
    reference: str, *, image_size_px: int | ImageSize, image_column: str | None = None, pixels: Pixels = RGB
) -> ImageSet:
    """Open the images of REFERENCE, cut to a size where they are no samples themselves."""
    size = ImageSize.of(image_size_px)
    path = expanded(reference)
    npz = path / SAMPLE_SET if (path / SAMPLE_SET).is_file() else path
    if npz.suffix != ".npz":
        source = open_images(reference, image_column=image_column).read_as(pixels)
        return SourceImages(source, size, cropped=True)
    if not npz.is_file():
        raise UserError(f"--reference '{npz}' does not exist", "Check the path")
    images = NpzImages(npz)
    if images.image_size != size:
        raise UserError(
            f"--reference '{npz}' holds images of {images.image_size} px, the samples have {size} px",
            "Compare images of one size",
        )
    if images.num_channels != pixels.channels:
        raise UserError(
            f"--reference '{npz}' holds images of {counted(images.num_channels, 'channel')}, the samples have "
            f"{pixels.channels}",
            "Compare images of one kind",
        )
    return images


def _common_size(source: ImageSource) -> ImageSize:
    """Read every image's header and hold the sizes to the first one's."""
    first: tuple[int, int] | None = None
    for index in range(len(source)):
        label = source.label(index)
        try:
            size = source.size(index)
        except BrokenImageError as error:
            raise UserError(f"The sample {error}", "Write it again or remove it") from None
        first = size if first is None else first
        if size != first:
            raise UserError(
                f"The sample '{label}' has {size[0]} x {size[1]} px, the first one has {first[0]} x {first[1]} px",
                "Samples are never cropped or resized: make them of one size",
            )
    assert first is not None  # open_images gives at least one image
    return ImageSize(*first[::-1])
