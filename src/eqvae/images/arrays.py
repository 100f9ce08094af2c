"""Pictures as arrays: `.npy`, `.npz` of one array, and the TIFFs that Pillow does not read. Nothing is unpickled."""

import io
import itertools
import logging
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import ExifTags

from eqvae.artifacts.sample_sets import open_array, read_header
from eqvae.images.bands import UPRIGHT, Bands, Decoded, Pixels, UnfitImageError, to_planes, wrong_channels

ARRAY_SUFFIXES = frozenset((".npy", ".npz"))
"""Names of pictures that are arrays: of DATA without other images alone, since arrays lie beside many images."""

_NPY, _NPZ = b"\x93NUMPY", b"PK\x03\x04"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

MAX_ARRAY_BYTES = 2**28
"""As planes. Decoding takes up to four times as much: the file, its numbers, their planes, and what is cut of them."""


def is_array(head: bytes) -> bool:
    """Tell an array from other pictures by its first bytes."""
    return head.startswith((_NPY, _NPZ))


def is_tiff(head: bytes) -> bool:
    """Tell a TIFF by its first bytes."""
    return head.startswith(_TIFF)


def decode_array(content: bytes | Path, pixels: Pixels) -> Decoded:
    """Decode `.npy` or `.npz`: H x W, H x W x C or C x H x W."""
    return to_planes(_channels_last(_read(content), pixels.channels), pixels)


def count_channels(content: bytes | Path) -> int | None:
    """Count the channels of a square picture that is an array; None where it is none."""
    try:
        array = _read(content)
    except Exception:  # damaged, or no array
        return None
    return {2: 1, 3: _likely_channels(array.shape)}[array.ndim] if array.ndim in (2, 3) else None


def _read(content: bytes | Path) -> Shaped[np.ndarray, "..."]:
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        is_archive = file.read(len(_NPZ)) == _NPZ
        file.seek(0)
        return _read_npz(file) if is_archive else _read_npy(file)


def _read_npy(file: io.BufferedIOBase) -> Shaped[np.ndarray, "..."]:
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    shape, is_fortran, dtype = read_header(file, num_bytes, "it")
    return _read_numbers(file, shape, is_fortran, dtype)


def _read_npz(file: io.BufferedIOBase) -> Shaped[np.ndarray, "..."]:
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} arrays ({', '.join(names[:3])}), and a picture is one")
    file.seek(0)
    with open_array(file, names[0]) as stored:
        return _read_numbers(*stored)


def _read_numbers(
    file: io.BufferedIOBase, shape: tuple[int, ...], is_fortran: bool, dtype: np.dtype
) -> Shaped[np.ndarray, "..."]:
    if dtype.hasobject or dtype.kind not in "buif":
        raise ValueError(f"it holds {dtype}, not numbers")
    _check_size(shape, dtype)
    array = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
    return array.reshape(shape, order="F" if is_fortran else "C")


def _check_size(shape: tuple[int, ...], dtype: np.dtype) -> None:
    # Planes are float32 where the numbers are not of 8 bits.
    num_bytes = math.prod(shape) * max(dtype.itemsize, 4 if dtype.itemsize > 1 else 1)
    if num_bytes > MAX_ARRAY_BYTES:
        size = f"{' x '.join(map(str, shape))} numbers of {dtype}"
        raise ValueError(f"{size} take {num_bytes >> 20:,} MiB, and a picture may take {MAX_ARRAY_BYTES >> 20}")
    if 0 in shape:
        raise ValueError(f"it is empty: its shape is {shape}")


def _channels_last(array: Shaped[np.ndarray, "..."], wanted: int) -> Shaped[np.ndarray, "h w k"]:
    """Find the channels' axis: the last or the first, which has as many as are wanted, or else one."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ValueError(f"its shape is {array.shape}; a picture is H x W, H x W x C or C x H x W")
    for count in (wanted, 1):
        for axis in (2, 0):
            if array.shape[axis] == count:
                return np.moveaxis(array, axis, 2)
    raise wrong_channels(_likely_channels(array.shape), wanted)


def _likely_channels(shape: tuple[int, ...]) -> int:
    """Say how many channels a picture has that may be H x W x C or C x H x W: the other two axes are often alike."""
    return shape[-1] if shape[0] == shape[1] else min(shape[0], shape[-1])


def decode_tiff(content: bytes | Path, pixels: Pixels) -> Decoded:
    """Decode a TIFF of any number of samples, or of one sample on each of several pages."""
    try:
        import tifffile
    except ImportError:
        raise UnfitImageError("it needs the package tifffile", "Run: pip install 'eqvae[tiff]'") from None
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what is wrong with a file is said in one line
    source: Any = io.BytesIO(content) if isinstance(content, bytes) else content
    with tifffile.TiffFile(source) as file:
        first: Any = file.pages[0]
        pages = [first]
        if first.samplesperpixel == 1 and pixels.channels > 1:
            pages += itertools.islice(file.pages, 1, pixels.channels + 1)  # one too many is refused
        if {page.shape for page in pages} != {first.shape}:
            raise ValueError("its pages have different sizes")
        _check_size((len(pages), *first.shape), first.dtype)
        bands = np.concatenate([_read_page(page) for page in pages], axis=2)
        num_bits = first.bitspersample if first.dtype.kind == "u" else None
        decoded = to_planes(bands, pixels, num_bits=num_bits)
        turn = UPRIGHT.get(int(first.tags.valueof(ExifTags.Base.Orientation, 1)))
    if turn is None:
        return decoded
    assert isinstance(decoded.picture, Bands)
    return decoded._replace(picture=decoded.picture.transpose(turn))


def _read_page(page: Any) -> Shaped[np.ndarray, "h w k"]:
    """Read one page, whose size has been checked."""
    axes = {"YX": (), "YXS": (0, 1, 2), "SYX": (1, 2, 0)}.get(page.axes)
    if axes is None:
        raise ValueError(f"its page has the axes {page.axes} and numbers of {page.dtype}")
    if page.photometric.name not in ("MINISBLACK", "RGB", "SEPARATED"):
        raise ValueError(f"its numbers are {page.photometric.name}, not how bright it is")
    _check_unpacks(page)
    array = page.asarray()
    return array.transpose(axes) if axes else array[..., None]


def _check_unpacks(page: Any) -> None:
    """Refuse what unpacks to more than a page has: only packings of bounded or of checked size are read."""
    name = page.compression.name
    if name in ("ADOBE_DEFLATE", "DEFLATE"):
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            page.parent.filehandle.seek(offset)
            unpacker = zlib.decompressobj()
            unpacker.decompress(page.parent.filehandle.read(count), page.nbytes + 1)
            if not unpacker.eof and unpacker.unconsumed_tail:
                raise ValueError(f"a strip unpacks to more than the {page.nbytes:,} bytes of its page")
    elif name not in ("NONE", "LZW"):  # tifffile reads LZW by imagecodecs alone, into room of the page's size
        raise ValueError(f"its packing, {name}, is not read: write it with deflate or none")
