"""One shard of a latent cache: a safetensors file that carries its own digest, read in place.

The header is parsed here and the tensors are mapped into memory: a shard pickles into workers as a path, holds no open
file, and a row is read without the others.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from safetensors.torch import save
from torch import Tensor

from eqvae.artifacts.files import write_atomically

MIRRORED = "_mirrored"
"""Suffix of the tensors of mirror images."""

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
}
"""Types in a cache, by their names in its index."""

_STORED_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I16": "int16", "I32": "int32", "I64": "int64"}
_NUMPY = {"bfloat16": np.dtype("<u2")} | {name: np.dtype(name) for name in DTYPES if name != "bfloat16"}
_NOTE = "eqvae"
"""The header's only entry of metadata: safetensors writes several in no fixed order, and equal content in equal bytes
is wanted."""

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class BrokenShardError(Exception):
    """A shard that is missing, truncated or damaged; the message says which of it, after the file's name."""


@final
@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies in a file."""

    dtype: str
    """A key of `DTYPES`."""

    shape: tuple[int, ...]

    start: int
    """First byte, from the file's beginning."""


@final
class Shard:
    """A shard on disk. Opening reads its header only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places, self.note, self.num_bytes = _read_header(path)
        self._bytes: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping behind: another process maps the file itself."""
        return self.__dict__ | {"_bytes": None}

    def array(self, name: str) -> Shaped[np.ndarray, "n ..."]:
        """View a tensor in place."""
        place = self.places[name]
        dtype = _NUMPY[place.dtype]
        count = int(np.prod(place.shape))
        if count == 0:
            return np.empty(place.shape, dtype)
        if self._bytes is None:
            self._bytes = _map(self.path, self.num_bytes)
        stored = self._bytes[place.start : place.start + count * dtype.itemsize]
        return np.asarray(stored.view(dtype).reshape(place.shape))

    def digest(self) -> str:
        """Read the whole file and digest what it holds."""
        described = {name: (place.dtype, place.shape) for name, place in self.places.items()}
        return _digest(described, {name: self.array(name) for name in self.places}, self.note)


def _map(path: Path, num_bytes: int) -> np.ndarray:
    """Map a file; NumPy's mapping keeps a descriptor, and ImageNet has more shards than a process may have of these."""
    try:
        return torch.from_file(str(path.resolve(strict=True)), size=num_bytes, dtype=torch.uint8).numpy()
    except (RuntimeError, UnicodeError):  # a name that is no text; NumPy says what else is wrong
        return np.memmap(path, mode="r", dtype=np.uint8)


def to_tensor(array: Shaped[np.ndarray, "..."], dtype: str) -> Shaped[Tensor, "..."]:
    """Give gathered rows their type."""
    tensor = torch.from_numpy(array.view(np.int16) if dtype == "bfloat16" else array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def write_shard(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> str:
    """Write a shard atomically: it is there whole, or not at all."""
    named = {name: tensors[name].contiguous() for name in sorted(tensors)}
    described = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in named.items()
    }
    arrays = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in named.items()}
    digest = _digest(described, arrays, note)
    # Not safetensors' own writing to a file: a full disk is an OSError here, and an error of its own there.
    content = save(named, {_NOTE: json.dumps(dict(note) | {"sha256": digest})})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return digest


def concatenate_labels(shards: list[Shard], name: str) -> Int64[np.ndarray, " n"]:
    """Read one small tensor of all shards."""
    return np.concatenate([np.empty(0, np.int64), *(shard.array(name) for shard in shards)])


def _digest(
    described: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]
) -> str:
    """SHA-256 over names, types, shapes, bytes and the note."""
    digest = hashlib.sha256()
    for name in sorted(described):
        digest.update(json.dumps([name, *described[name]]).encode())
        digest.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    said = {key: value for key, value in note.items() if key != "sha256"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, TensorPlace], dict[str, Any], int]:
    """Parse a safetensors header and hold it against the file's size."""
    try:
        with path.open("rb") as file:
            num_bytes = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, num_bytes - 8):
                raise BrokenShardError("is truncated or damaged (header)")
            header = json.loads(file.read(length))
        note = json.loads(header.pop("__metadata__")[_NOTE])
        places, end = {}, 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = _STORED_NAMES[entry["dtype"]], tuple(map(int, entry["shape"]))
            places[name] = TensorPlace(dtype=dtype, shape=shape, start=end)
            start, end = end, 8 + length + int(entry["data_offsets"][1])
            if end - start != int(np.prod(shape)) * _NUMPY[dtype].itemsize or start != 8 + length + int(
                entry["data_offsets"][0]
            ):
                raise BrokenShardError(f"is damaged (place of '{name}')")
    except FileNotFoundError:
        raise BrokenShardError("is missing") from None
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenShardError(f"is truncated or damaged ({type(error).__name__} in its header)") from None
    if end != num_bytes:
        raise BrokenShardError(f"is truncated or damaged ({num_bytes} bytes instead of {end})")
    if not isinstance(note, dict):
        raise BrokenShardError("is no shard of a latent cache")
    return places, note, num_bytes
