"""Class labels as they stand in the data, checked and numbered when somebody asks for them.

The classes are those that occur, under the names that the data give them; names that are numbers sort as numbers.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from eqvae.errors import UserError

NO_LABELS = "none"
"""`--label-column none` leaves labels out."""

MAX_CLASSES = 1_000_000
"""A larger integer is an identifier rather than a class."""

_NUMBER = re.compile(r"[-+]?\d{1,300}(\.\d{1,300})?")
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

    values: Any
    """A `pyarrow.ChunkedArray` of integers or strings."""

    names: tuple[str, ...] | None = None
    """Names of integer labels, where the data say them."""

    def first(self, num_images: int) -> "LabelColumn":
        """Keep the labels of the first images."""
        return replace(self, values=self.values.slice(0, num_images))

    def classes(self, name_row: Callable[[int], str]) -> Classes:
        """Check the labels and number those that occur."""
        if self.values.null_count:
            self._refuse(self.values.is_null().to_numpy(), name_row, "has no label")
        if not pa.types.is_integer(self.values.type):
            texts = self.values.to_numpy()
            found = sorted(set(texts), key=number_first)
            number_of = {text: number for number, text in enumerate(found)}
            return Classes(names=tuple(found), indices=np.fromiter(map(number_of.get, texts), np.int64, len(texts)))
        labels = self.values.to_numpy().astype(np.int64)
        num_classes = len(self.names) if self.names is not None else MAX_CLASSES
        outside = (labels < 0) | (labels >= num_classes)
        if outside.any():
            label = labels[int(np.argmax(outside))]
            self._refuse(outside, name_row, f"has label {label}, out of range for {num_classes} classes")
        occurring, indices = np.unique(labels, return_inverse=True)
        names = tuple(str(label) if self.names is None else self.names[label] for label in occurring.tolist())
        return Classes(names=names, indices=indices.astype(np.int64).reshape(-1))

    def _refuse(self, wrong: Bool[np.ndarray, " n"], name_row: Callable[[int], str], what: str) -> None:
        count = int(wrong.sum())
        more = f", and {count - 1} more such row{'' if count == 2 else 's'}" if count > 1 else ""
        raise UserError(f"'{name_row(int(np.argmax(wrong)))}' {what}{more}", _MEND)


def number_first(name: str) -> tuple[int, float, str]:
    """Sort numbers as numbers, and before words."""
    return (0, float(name), name) if _NUMBER.fullmatch(name) else (1, 0.0, name)


def text_labels(texts: Sequence[str | None]) -> LabelColumn | None:
    """Take labels that were written as text: integers where all are, else names; an empty text is none."""
    texts = [text if text and text.strip() else None for text in texts]
    if all(text is None for text in texts):
        return None
    if all(text is None or _INTEGER.fullmatch(text) for text in texts):
        return LabelColumn(
            values=pa.chunked_array([[None if text is None else int(text) for text in texts]], pa.int64())
        )
    return LabelColumn(values=pa.chunked_array([texts], pa.large_string()))


def to_labels(column: pa.ChunkedArray) -> pa.ChunkedArray | str:
    """Bring a table's column to integers or strings, or say why it holds no labels."""
    import pyarrow.compute as pc  # no `--help` waits for it

    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        if pa.types.is_null(kind) or column.null_count == len(column):
            return "is empty"
        if pa.types.is_boolean(kind):
            return column.cast(pa.large_string())
        if pa.types.is_floating(kind):
            column = column.cast(pa.float64())
            # pandas writes integers with gaps as floats, a gap as NaN.
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
            return column.cast(pa.int64())
        if pa.types.is_integer(kind):
            return column.cast(pa.int64())
        if is_text(kind):
            column = column.cast(pa.large_string())
            is_blank = pc.equal(pc.utf8_trim_whitespace(column), "")
            column = pc.if_else(is_blank, pa.scalar(None, pa.large_string()), column)
            return "is empty" if column.null_count == len(column) else column
    except pa.ArrowInvalid:
        return (
            "holds numbers that are not whole" if pa.types.is_floating(kind) else f"holds {kind} that can't be labels"
        )
    return f"holds {kind}"


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column's type is text, or bytes that may be."""
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_binary(kind)


def can_label(kind: pa.DataType) -> bool:
    """Tell by its type whether a column can hold labels at all."""
    if pa.types.is_dictionary(kind):
        return can_label(kind.value_type)
    types = pa.types
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    return is_number or (is_text(kind) and not types.is_binary(kind)) or types.is_null(kind)
