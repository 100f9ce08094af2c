"""Where images come from: built-in photographs, folders, parquet, tar shards, the Hugging Face hub.

Every kind is held as a `datasets.Dataset` of paths, bytes or places in an archive, which stays small in memory however
many workers share it; decoding is ours (`decoding.py`).
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final, runtime_checkable

import datasets
from PIL import Image

from eqvae.errors import UserError, nearest_name
from eqvae.images.archives import open_archives
from eqvae.images.decoding import IMAGE_SUFFIXES, BrokenImageError, decode_image
from eqvae.images.labels import NO_LABELS, Classes, LabelColumn, folder_labels
from eqvae.images.tables import Split, num_bytes, open_hub, open_parquet

KINDS = ("photos", "an image folder", "*.parquet", "*.tar", "hf:NAME[:SPLIT]")
"""What DATA can be."""

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "astronaut.webp",
        "coffee.webp",
        "hubble_deep_field.jpg",
        "motorcycle_left.webp",  # the two motorcycles are a stereo pair: never one in each set
        "motorcycle_right.webp",
        "china.jpg",
    ),
    "evaluation": (
        "chelsea.webp",
        "rocket.jpg",
        "flower.jpg",
    ),
}
"""In the folder `photographs`, whose CREDITS.md says where they are from."""


_HOME = Path(__file__).with_name("photographs")


@runtime_checkable
class _Rows(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes | Path: ...

    def label(self, index: int) -> str: ...

    def identities(self) -> Iterator[str]: ...


@final
class ImageSource:
    """A sequence of images, each decoded when it is read. Pickles, so that loader workers can hold it."""

    def __init__(self, name: str, rows: _Rows, labels: LabelColumn | None = None) -> None:
        """Name the rows; `open_images` makes them."""
        self.name = name
        self._rows = rows
        self._labels = labels
        self._classes: Classes | None = None

    def __len__(self) -> int:
        """Count the images, broken ones included."""
        return len(self._rows)

    def read(self, index: int) -> Image.Image:
        """Decode one image."""
        label = self.label(index)
        try:
            content = self._rows.content(index)
        except (OSError, ValueError) as error:
            raise BrokenImageError(f"'{label}' cannot be read: {error}") from None
        return decode_image(content, label)

    def label(self, index: int) -> str:
        """Name one image."""
        return self._rows.label(index)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of their indices; None where the images have no labels."""
        classes = self._check_classes()
        return None if classes is None else classes.names

    def class_of(self, index: int) -> int | None:
        """Look up the class of one image."""
        classes = self._check_classes()
        return None if classes is None else int(classes.indices[index])

    def fingerprint(self) -> str:
        """Digest names and sizes, wherever the data lie: 16 hexadecimal digits. No image is read."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        for identity in self._rows.identities():
            digest.update(f"{identity}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def _check_classes(self) -> Classes | None:
        if self._classes is None and self._labels is not None:
            self._classes = self._labels.classes(self.label)
        return self._classes


@final
@dataclass(frozen=True, kw_only=True)
class _Files:
    """Image files."""

    paths: datasets.Dataset
    """Column `path`."""

    root: Path
    """A folder above all of them."""

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, index: int) -> Path:
        return Path(self.label(index))

    def label(self, index: int) -> str:
        return self.paths[index]["path"]

    def identities(self) -> Iterator[str]:
        for row in self.paths:
            path = Path(row["path"])
            yield f"{_relative(path, self.root).as_posix()} {num_bytes(path)}"


def open_images(data: str, *, split: Split = "train", label_column: str | None = None) -> ImageSource:
    """Open DATA."""
    if data.startswith("hf:"):
        table = open_hub(data, split, label_column)
        return ImageSource(data, table.rows, table.labels)
    if data == "photos":
        _check_no_table(data, label_column)
        return ImageSource(data, _files_to_rows([_HOME / name for name in PHOTOGRAPHS[split]], _HOME))
    files = _list_files(data)
    by_suffix = {
        kind: [file for file in files if file.suffix.lower() in suffixes]
        for kind, suffixes in (("image", IMAGE_SUFFIXES), ("parquet", {".parquet"}), ("tar", {".tar"}))
    }
    if by_suffix["parquet"] and not by_suffix["image"]:
        table = open_parquet(data, by_suffix["parquet"], label_column)
        return ImageSource(data, table.rows, table.labels)
    _check_no_table(data, label_column)
    is_labelled = label_column != NO_LABELS
    if by_suffix["image"]:
        root = _root(data)
        labels = folder_labels([_relative(file, root).parent for file in by_suffix["image"]]) if is_labelled else None
        return ImageSource(data, _files_to_rows(by_suffix["image"], root), labels)
    if by_suffix["tar"]:
        members = open_archives(data, by_suffix["tar"])
        return ImageSource(data, members, members.find_labels() if is_labelled else None)
    raise UserError(
        f"'{data}' holds no image ({len(files)} other file{'' if len(files) == 1 else 's'})",
        f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}; tables in .parquet; archives in .tar",
    )


def _list_files(data: str) -> list[Path]:
    """List the files that a path or a glob names, in the order of their paths; hidden ones are left out."""
    path = Path(data).expanduser()
    if path.is_file():
        return [path]
    pattern = f"{glob.escape(str(path))}/**/*" if path.is_dir() else str(path)
    # Not Path.rglob: it lists hidden files, and does not follow links to class folders.
    files = sorted(file for file in map(Path, glob.iglob(pattern, recursive=True)) if file.is_file())  # noqa: PTH207
    if not files and not path.is_dir():
        mend = nearest_name(data, KINDS) if data.isalpha() else f"Check the path; data is one of: {', '.join(KINDS)}"
        raise UserError(f"Data '{data}' does not exist", mend)
    return files


def _root(data: str) -> Path:
    """Find the folder under which a path's or a glob's files lie: class folders are directly under it."""
    path = Path(data).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    wild = next((index for index, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts) - 1)
    return Path(*path.parts[:wild])


def _relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)


def _check_no_table(data: str, label_column: str | None) -> None:
    if label_column not in (None, NO_LABELS):
        raise UserError(
            f"--label-column '{label_column}': '{data}' is no table and has no columns",
            f"Leave it out, or give '{NO_LABELS}' to ignore labels",
        )


def _files_to_rows(paths: Sequence[Path], root: Path) -> _Files:
    return _Files(paths=datasets.Dataset.from_dict({"path": [str(path) for path in paths]}), root=root)
