"""Which column of a table holds the images, and which the labels: nothing is chosen without a word."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pyarrow as pa

from eqvae.errors import UserError, nearest_name, printable
from eqvae.images.archives import USUAL_NAMES
from eqvae.images.decoding import is_image
from eqvae.images.labels import NO_LABELS, LabelColumn, can_label, is_text, to_labels

LABEL_COLUMNS = ("label", "labels", "fine_label", "fine_labels", "class", "class_label", "target", "cls")
"""Names under which a table's labels are looked for, the likeliest first."""

NUM_PROBED_CELLS = 16
"""That are not empty, of each column that may hold images."""


@final
@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of one or several tables, whatever they are stored in."""

    kinds: Mapping[str, pa.DataType]

    declared: Mapping[str, tuple[str, ...]]
    """Names of the integers of a column, where the table says them."""

    contents: Callable[[str], Iterator[bytes | Path | None]]
    """What the cells of one column hold, read as they are asked for."""

    read: Callable[[str], list[pa.ChunkedArray]]
    """One column of each table."""


def choose_images(data: str, columns: Columns, wanted: str | None) -> tuple[str, str]:
    """Choose the image column: the one that is asked for, else one that holds images, the usual names first."""
    able = [name for name, kind in columns.kinds.items() if is_encoded(kind)]
    if wanted is not None and wanted not in columns.kinds:
        raise UserError(f"'{printable(data)}' has no column '{wanted}'", nearest_name(wanted, able or columns.kinds))
    found = [name for name in able if wanted in (None, name) and _holds_images(columns, name)]
    if not found:
        what = "no image column" if wanted is None else f"no images in --image-column '{wanted}'"
        raise UserError(
            f"'{printable(data)}' has {what} (columns: {', '.join(columns.kinds)})",
            "Images are encoded bytes, plain or in a struct with `bytes` and `path`",
        )
    usual = {name: place for place, name in enumerate(USUAL_NAMES)}
    chosen = min(found, key=lambda name: usual.get(name.lower(), len(usual)))
    others = ", ".join(f"'{name}'" for name in found if name != chosen)
    return chosen, f"images of '{chosen}', not of {others} (--image-column chooses)" if others else ""


def is_encoded(kind: pa.DataType) -> bool:
    """Tell whether a column's type can hold encoded images."""
    if pa.types.is_dictionary(kind):
        return is_encoded(kind.value_type)
    if pa.types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path"})
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _holds_images(columns: Columns, name: str) -> bool:
    """Look at the first cells that are not empty."""
    filled = itertools.islice((content for content in columns.contents(name) if content), NUM_PROBED_CELLS)
    return any(is_image(content) for content in filled)


def cell_to_content(cell: Any, folder: Path) -> bytes | Path | None:
    """Take the bytes, or else the path, out of a cell."""
    if not isinstance(cell, dict):
        return cell
    if cell.get("bytes") is not None:
        return cell["bytes"]
    path = cell.get("path")
    if not path:
        return None
    beside = folder / path
    return beside if os.path.exists(beside) else Path(path)  # noqa: PTH110 (`Path.exists` raises for odd names)


def filled(content: bytes | Path | None) -> bytes | Path:
    if not content:
        raise ValueError("the cell is empty")
    return content


def choose_labels(data: str, columns: Columns, wanted: str | None) -> tuple[LabelColumn | None, str, str]:
    """Find a table's labels: the column that is asked for, else a known name, else the only column of class labels.

    Returns the labels, or why there are none, and which column was taken of several.
    """
    if wanted == NO_LABELS:
        return None, "as asked", ""
    able = [name for name, kind in columns.kinds.items() if can_label(kind)]
    if wanted is not None:
        if wanted not in columns.kinds:
            raise UserError(f"'{printable(data)}' has no column '{wanted}'", nearest_name(wanted, columns.kinds))
        if isinstance(labels := _read_labels(columns, wanted), str):
            what = "holds neither integers nor strings" if wanted not in able else labels
            raise UserError(f"--label-column '{wanted}' of '{printable(data)}' {what}", nearest_name("", able))
        return labels, "", ""
    known = [name for name in LABEL_COLUMNS if name in columns.kinds]
    candidates = known or (list(columns.declared) if len(columns.declared) == 1 else [])
    if not candidates:
        return None, "no column is called label; --label-column names one" if able else "no column of labels", ""
    unusable = ""
    for name in candidates:
        labels = _read_labels(columns, name)
        if isinstance(labels, str):
            unusable = unusable or f"column '{name}' {labels}"
            continue
        others = ", ".join(f"'{other}'" for other in candidates if other != name)
        return labels, "", f"labels of '{name}', not of {others} (--label-column chooses)" if others else ""
    return None, unusable, ""


def _read_labels(columns: Columns, name: str) -> LabelColumn | str:
    """Read a column as labels, or say why it holds none."""
    if not (can_label(columns.kinds[name]) or is_text(columns.kinds[name])):
        return f"holds {columns.kinds[name]}"
    columns_read = columns.read(name)
    parts = [to_labels(part) for part in columns_read]
    usable = [part for part in parts if not isinstance(part, str)]
    if len(usable) < len(parts) and (not usable or any(part != "is empty" for part in parts if isinstance(part, str))):
        return next(part for part in parts if isinstance(part, str))
    kinds = {part.type for part in usable}
    if len(kinds) > 1:
        return "holds numbers here, text there"
    (kind,) = kinds
    chunks = [
        pa.nulls(len(read), kind) if isinstance(part, str) else part.combine_chunks()
        for part, read in zip(parts, columns_read, strict=True)
    ]
    return LabelColumn(values=pa.chunked_array(chunks, kind), names=columns.declared.get(name) or None)
