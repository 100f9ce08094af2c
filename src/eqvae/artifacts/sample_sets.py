"""Sample sets on disk: `.npz` archives in ADM's layout (openai/guided-diffusion), read as streams, never unpickled.

`arr_0` holds the images, uint8 (n, h, w, 3); `arr_1`, if there, their classes. Reference batches also hold the moments
of a larger set: `mu` and `sigma` of pooled features, `mu_s` and `sigma_s` of spatial ones.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from eqvae.artifacts.files import write_atomically
from eqvae.errors import UserError

IMAGES_KEY, LABELS_KEY = "arr_0", "arr_1"
MOMENT_KEYS = ("mu", "sigma", "mu_s", "sigma_s")

_MEND = "An .npz in ADM's layout holds 'arr_0': uint8 (n, h, w, 3), 0 ... 255"


def write_sample_set(
    path: Path, images: UInt8[np.ndarray, "n h w 3"], labels: Int64[np.ndarray, " n"] | None = None
) -> None:
    """Write an `.npz` in ADM's layout, which ADM's evaluator reads as it is; atomic, not compressed."""
    arrays = {IMAGES_KEY: images} | ({} if labels is None else {LABELS_KEY: labels})

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)


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
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"'{path}' is truncated, damaged or no .npz file ({error})", "Fetch or write it again"
        ) from None


def _list_keys(path: Path) -> list[str]:
    with reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def open_member(path: Path, key: str) -> Iterator[zipfile.ZipExtFile]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        assert isinstance(file, zipfile.ZipExtFile)
        yield file


def read_header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read an array's shape, whether it is in Fortran's order, and its type."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def check_header(path: Path) -> tuple[int, ...]:
    """Hold `arr_0` to what it must be, without reading the images; returns its shape."""
    keys = _list_keys(path)
    if IMAGES_KEY not in keys:
        raise UserError(f"'{path}' has no key 'arr_0' (keys: {', '.join(keys) or 'none'})", _MEND)
    with reading(path), open_member(path, IMAGES_KEY) as file:
        shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise UserError(f"'{path}' holds Python objects: are its images of mixed sizes?", _MEND)
    if dtype != np.uint8:
        raise UserError(f"'{path}' holds {dtype} numbers, not 8-bit images", f"{_MEND}; round and convert them")
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or is_fortran:
        order = " in Fortran's order" if is_fortran else ""
        raise UserError(f"'{path}' holds an array of shape {shape}{order}, not square RGB images", _MEND)
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
