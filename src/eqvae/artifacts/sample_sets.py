"""Sample sets on disk: `.npz` archives in ADM's layout (openai/guided-diffusion), read as streams, never unpickled.

`arr_0` holds the images, uint8 (n, h, w, channels), of three channels in ADM's own; `arr_1`, if there, their classes.
Reference batches also hold the moments of a larger set: `mu` and `sigma` of pooled features, `mu_s` and `sigma_s` of
spatial ones.
"""

import io
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from eqvae.artifacts.files import write_atomically
from eqvae.artifacts.parsing import DAMAGE
from eqvae.errors import UserError

IMAGES_KEY, LABELS_KEY = "arr_0", "arr_1"
MOMENT_KEYS = ("mu", "sigma", "mu_s", "sigma_s")

_MAX_ARRAY_BYTES = 2**28
"""Of moments; Inception's covariance has 32 MiB."""

_BOMB_BYTES, _BOMB_RATIO = 2**26, 200
"""Pictures of more than so many bytes never take less than one in so many."""

_MAX_CHANNELS = 512
"""More than cameras have; an array with more has its axes in another order."""

_FEW = 4
"""Pictures with more channels than so many have more rows."""

_MEND = "An .npz in ADM's layout holds 'arr_0': uint8 (n, h, w, 3), 0 ... 255"


def write_sample_set(
    path: Path, images: UInt8[np.ndarray, "n h w k"], labels: Int64[np.ndarray, " n"] | None = None
) -> None:
    """Write an `.npz` in ADM's layout, which ADM's evaluator reads as it is; atomic, not compressed."""
    stream_sample_set(path, [images], images.shape, labels)


def stream_sample_set(
    path: Path,
    blocks: Iterable[UInt8[np.ndarray, "_ h w k"]],
    shape: tuple[int, ...],
    labels: Int64[np.ndarray, " n"] | None = None,
) -> None:
    """Write what `numpy.savez` would write of all blocks together, one after the other: no set has to fit memory."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(f"{IMAGES_KEY}.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks:
                    file.write(np.ascontiguousarray(block).data)
            if labels is not None:
                with archive.open(f"{LABELS_KEY}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, labels, allow_pickle=False)

    write_atomically(path, write)


def read_blocks(path: Path, num_rows: int = 256) -> Iterator[UInt8[np.ndarray, "_ h w k"]]:
    """Read the images of a set, some at a time; whoever reads to the end has the archive's checksum compared."""
    num_images, *size = check_header(path)
    with reading(path), open_array(path, IMAGES_KEY) as (file, *_):
        for first in range(0, num_images, num_rows):
            count = min(num_rows, num_images - first)
            content = file.read(count * math.prod(size))
            yield np.frombuffer(content, np.uint8).reshape(count, *size)


def pick_images(path: Path, indices: Sequence[int]) -> UInt8[np.ndarray, "n h w k"]:
    """Read some images of a set."""
    picked: dict[int, UInt8[np.ndarray, "h w k"]] = {}
    first = 0
    for block in read_blocks(path):
        rows = range(first, first + len(block))
        picked |= {index: block[index - first] for index in indices if index in rows}
        first = rows.stop
        if first > max(indices):
            break
    return np.stack([picked[index] for index in indices])


def moments_in(path: Path) -> frozenset[str]:
    """List which of ADM's moments an `.npz` holds."""
    if not path.is_file():
        return frozenset()
    return frozenset(_list_keys(path)) & set(MOMENT_KEYS)


def has_images(path: Path) -> bool:
    """Whether an `.npz` holds images."""
    return IMAGES_KEY in _list_keys(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into one line."""
    try:
        yield
    except DAMAGE as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"'{path}' is truncated, damaged or no .npz file ({what})", "Fetch or write it again") from None


def _list_keys(path: Path) -> list[str]:
    with reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


class StoredArray(NamedTuple):
    """An array in an archive, of which the header has been read."""

    file: zipfile.ZipExtFile
    """Where its numbers begin."""

    shape: tuple[int, ...]

    is_fortran: bool
    """Whether the first axis varies fastest."""

    dtype: np.dtype


def read_header(file: io.BufferedIOBase, file_size: int, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an array's shape, whether its first axis varies fastest, and its type; nothing is unpickled.

    A ValueError refuses an array that is not as long as its header says.
    """
    is_first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if any(isinstance(side, bool) or not 0 <= side < 2**48 for side in shape):
        raise ValueError(f"'{name}' has the shape {shape}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and file.tell() + num_bytes != file_size:
        raise ValueError(f"'{name}' of shape {shape} has other than {num_bytes} bytes")
    return shape, is_fortran, dtype


@contextmanager
def open_array(path: Path | io.BufferedIOBase, key: str) -> Iterator[StoredArray]:
    """Open an array that is as long as its header says, and does not fill the memory from a small file."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
        if info.file_size > _BOMB_BYTES and info.file_size > _BOMB_RATIO * info.compress_size:
            raise ValueError(f"'{key}' unpacks from {info.compress_size} bytes to {info.file_size}, as no pictures do")
        with archive.open(info) as file:
            assert isinstance(file, zipfile.ZipExtFile)
            shape, is_fortran, dtype = read_header(file, info.file_size, key)
            yield StoredArray(file, shape, is_fortran, dtype)


def read_array(path: Path, key: str) -> np.ndarray:
    """Read an array other than the images, moments say, whole."""
    with reading(path), open_array(path, key) as (file, shape, is_fortran, dtype):
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > _MAX_ARRAY_BYTES:
            raise ValueError(f"'{key}' of type {dtype} and shape {shape}")
        array = np.frombuffer(file.read(), dtype)
        return array.reshape(shape, order="F" if is_fortran else "C")


def check_header(path: Path) -> tuple[int, ...]:
    """Hold `arr_0` to what it must be, without reading the images; returns its shape."""
    keys = _list_keys(path)
    if IMAGES_KEY not in keys:
        raise UserError(f"'{path}' has no key 'arr_0' (keys: {', '.join(keys) or 'none'})", _MEND)
    with reading(path), open_array(path, IMAGES_KEY) as (_, shape, is_fortran, dtype):
        pass
    if dtype.hasobject:
        raise UserError(f"'{path}' holds Python objects: are its images of mixed sizes?", _MEND)
    if dtype != np.uint8:
        raise UserError(f"'{path}' holds {dtype} numbers, not 8-bit images", f"{_MEND}; round and convert them")
    is_channels_first = len(shape) == 4 and shape[1] <= _FEW < shape[3]
    if len(shape) != 4 or shape[3] > _MAX_CHANNELS or is_channels_first or is_fortran:
        order = " in Fortran's order" if is_fortran else ""
        raise UserError(f"'{path}' holds an array of shape {shape}{order}, not images", _MEND)
    if 0 in shape:
        raise UserError(f"'{path}' holds no image: its shape is {shape}", _MEND)
    return shape


def skip(file: zipfile.ZipExtFile, num_bytes: int) -> None:
    """Read on without keeping anything; seeking would leave the archive's checksum unchecked."""
    while num_bytes:
        content = file.read(min(num_bytes, 2**24))
        if not content:
            raise EOFError("it ends too early")
        num_bytes -= len(content)
