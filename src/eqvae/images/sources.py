"""A sequence of images, wherever they lie, and their class labels.

Labels come from folder names, a column of a table, or the `.cls` members of tar shards. They are checked when somebody
asks for them: work that needs no labels is not stopped by a wrong one.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, final, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64
from PIL import Image

from eqvae.errors import UserError
from eqvae.images.decoding import BrokenImageError, decode_image

if TYPE_CHECKING:
    import datasets  # takes half a second: it is imported where data are opened, so that no `--help` waits for it

Split = Literal["train", "evaluation"]

NO_LABELS = "none"
"""`--label-column none` leaves labels out."""

MAX_CLASSES = 1_000_000
"""A larger integer is an identifier rather than a class."""

_INTEGER = re.compile(r"-?\d{1,18}")
_MEND = f"Mend the data, or leave its labels out with --label-column {NO_LABELS}"


@final
@dataclass(frozen=True, kw_only=True)
class Classes:
    """The class of each image."""

    names: tuple[str, ...]

    indices: Int64[np.ndarray, " n"]
    """0 ... len(names) - 1."""


@final
@dataclass(frozen=True, kw_only=True)
class LabelColumn:
    """Labels as they stand in the data, not yet checked."""

    values: "datasets.Dataset"
    """One column of integers or strings."""

    names: tuple[str, ...] | None = None
    """Names of integer labels, where the data say them."""

    def classes(self, name_row: Callable[[int], str]) -> Classes:
        """Check the labels and number them.

        Integers stand for themselves; strings are numbered in their order.
        """
        column = self.values.with_format("arrow")[:].column(0)
        if column.null_count:
            self._refuse(column.is_null().to_numpy(), name_row, "has no label")
        if not pa.types.is_integer(column.type):
            texts = column.cast(pa.string()).to_numpy()
            found, numbers = np.unique(texts.astype(object), return_inverse=True)
            return Classes(names=tuple(map(str, found)), indices=numbers.astype(np.int64).reshape(-1))
        indices = column.to_numpy().astype(np.int64)
        num_classes = len(self.names) if self.names is not None else MAX_CLASSES
        outside = (indices < 0) | (indices >= num_classes)
        if outside.any():
            label = indices[int(np.argmax(outside))]
            self._refuse(outside, name_row, f"has label {label}, out of range for {num_classes} classes")
        names = self.names if self.names is not None else tuple(map(str, range(int(indices.max()) + 1)))
        return Classes(names=names, indices=indices)

    def _refuse(self, wrong: Bool[np.ndarray, " n"], name_row: Callable[[int], str], what: str) -> None:
        count = int(wrong.sum())
        more = f", and {count - 1} more such row{'' if count == 2 else 's'}" if count > 1 else ""
        raise UserError(f"'{name_row(int(np.argmax(wrong)))}' {what}{more}", _MEND)


@runtime_checkable
class Rows(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes | Path: ...

    def label(self, index: int) -> str: ...

    def identities(self) -> Iterator[str]: ...


@final
class ImageSource:
    """A sequence of images, each decoded when it is read. Pickles, so that loader workers can hold it."""

    def __init__(self, name: str, rows: Rows, labels: LabelColumn | None = None) -> None:
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


def folder_labels(folders: Sequence[Path]) -> LabelColumn | None:
    """Take the first folder of each image's path as its class."""
    names = [folder.parts[0] if folder.parts else None for folder in folders]
    if None in names or len(set(names)) < 2:
        return None
    import datasets

    return LabelColumn(values=datasets.Dataset.from_dict({"folder": names}))


def text_labels(texts: Sequence[str | None]) -> LabelColumn | None:
    """Take labels that were written as text: integers where all are, else names."""
    if all(text is None for text in texts):
        return None
    import datasets

    if all(text is None or _INTEGER.fullmatch(text) for text in texts):
        return LabelColumn(values=datasets.Dataset.from_dict({"cls": [text and int(text) for text in texts]}))
    return LabelColumn(values=datasets.Dataset.from_dict({"cls": list(texts)}))


def num_bytes(path: Path) -> int:
    """Ask for a file's size."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
