"""Images in tables: parquet files and data sets of the Hugging Face hub."""

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import datasets

from eqvae.errors import UserError, nearest_name
from eqvae.images.decoding import is_image
from eqvae.images.sources import NO_LABELS, ImageSource, LabelColumn, Split, num_bytes

LABEL_COLUMNS = ("label", "labels", "fine_label", "fine_labels", "class", "class_label", "target", "cls")
"""Names under which a table's labels are looked for, the likeliest first."""

_EVALUATION_SPLITS = ("validation", "valid", "val", "test")
_NUM_PROBED_ROWS = 16


@final
@dataclass(frozen=True, kw_only=True)
class Column:
    """The image column of one or several tables."""

    table: datasets.Dataset
    """That column alone, not decoded."""

    parts: tuple[str, ...]
    """Names of the tables that were joined."""

    ends: tuple[int, ...]
    """Row after the last of each part."""

    sizes: tuple[int, ...]
    """Bytes of each part; 0 where that is not known."""

    def __len__(self) -> int:
        return len(self.table)

    def content(self, index: int) -> bytes | Path:
        content = _value_to_content(self.table[index][self.table.column_names[0]])
        if content is None:
            raise ValueError("the row is empty")
        return content

    def label(self, index: int) -> str:
        part = bisect_right(self.ends, index)
        return f"{self.parts[part]}[{index - (self.ends[part - 1] if part else 0)}]"

    def identities(self) -> Iterator[str]:
        for part, end, size in zip(self.parts, self.ends, self.sizes, strict=True):
            yield f"{Path(part).name} {end} {size}"


def open_parquet(data: str, files: Sequence[Path], label_column: str | None) -> ImageSource:
    """Open parquet files through `datasets`, whose cache goes by path and modification time."""
    for file in files:
        _check_parquet(file)
    # One split for each file: only so are their numbers of rows known afterwards.
    splits = {f"file{index}": [glob.escape(str(file.absolute()))] for index, file in enumerate(files)}
    try:
        builder = datasets.load_dataset_builder("parquet", data_files=splits)
        builder.download_and_prepare()
        lengths = [builder.info.splits[name].num_examples for name in splits]
        # An empty split cannot be opened.
        tables = [builder.as_dataset(split=name) for name, length in zip(splits, lengths, strict=True) if length]
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error)
        raise UserError(f"'{data}' cannot be read as parquet ({reason})", "Do its files share one schema?") from None
    if not tables:
        raise UserError(f"'{data}' has no rows", "Give a table with images")
    table = datasets.concatenate_datasets(tables)
    rows = Column(
        table=_select_images(data, table),
        parts=tuple(map(str, files)),
        ends=tuple(accumulate(lengths)),
        sizes=tuple(map(num_bytes, files)),
    )
    return ImageSource(data, rows, find_label_column(data, table, label_column))


def _check_parquet(file: Path) -> None:
    """Refuse truncated files by name; `datasets` would not say which of them it is."""
    try:
        with file.open("rb") as opened:
            head = opened.read(4)
            opened.seek(max(0, file.stat().st_size - 4))
            tail = opened.read(4)
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror})", "Check its permissions") from None
    if head != b"PAR1" or tail != b"PAR1":
        raise UserError(f"'{file}' is truncated or no parquet file", "Fetch or write it again")


def open_hub(data: str, split: Split, label_column: str | None) -> ImageSource:
    """Open a data set of the hub, or of its local cache."""
    name, _, hub_split = data.removeprefix("hf:").partition(":")
    try:
        hub_split = hub_split or _choose_split(data, datasets.get_dataset_split_names(name), split)
        table = datasets.load_dataset(name, split=hub_split)
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"'{data}': the hub has no data set '{name}', or it is private", "Check the name, or log in with `hf auth`"
        ) from None
    except ConnectionError:
        raise UserError(
            f"'{data}': the hub cannot be reached and '{name}' is not in the local cache",
            "Without network, use `photos`, an image folder, *.parquet or *.tar",
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"'{data}' cannot be opened ({error})", "DATA is hf:NAME[:SPLIT]") from None
    part = f"hf:{name}:{hub_split}"
    rows = Column(table=_select_images(data, table), parts=(part,), ends=(len(table),), sizes=(0,))
    return ImageSource(data, rows, find_label_column(data, table, label_column))


def _choose_split(data: str, names: Sequence[str], split: Split) -> str:
    """Choose the hub's split for training or for evaluation."""
    for name in ("train",) if split == "train" else _EVALUATION_SPLITS:
        if name in names:
            return name
    raise UserError(f"'{data}' has no split for {split}", f"Name one of: {', '.join(f'{data}:{n}' for n in names)}")


def _select_images(data: str, table: datasets.Dataset) -> datasets.Dataset:
    """Keep the image column alone, not decoded. It is found by its content, not by its name."""
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif not _is_encoded(feature):
            continue
        candidate = table.select_columns([column])
        probed = candidate[:_NUM_PROBED_ROWS][column]
        if any(content is not None and is_image(content) for content in map(_value_to_content, probed)):
            return candidate
    raise UserError(
        f"'{data}' has no image column (columns: {', '.join(table.column_names)})",
        "Images are encoded bytes, plain or in a struct with `bytes` and `path`",
    )


def _is_encoded(feature: Any) -> bool:
    """Tell whether a column's type can hold encoded images."""
    if isinstance(feature, dict):
        return "bytes" in feature or "path" in feature
    return isinstance(feature, datasets.Value) and "binary" in feature.dtype


def _value_to_content(value: Any) -> bytes | Path | None:
    """Take the bytes, or else the path, out of a cell."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        return Path(value["path"]) if value.get("path") else None
    return value


def find_label_column(data: str, table: datasets.Dataset, wanted: str | None) -> LabelColumn | None:
    """Find a table's labels: the column that is asked for, else a known name, else the only column of class labels."""
    if wanted == NO_LABELS:
        return None
    if wanted is not None:
        if wanted not in table.features:
            raise UserError(f"'{data}' has no column '{wanted}'", nearest_name(wanted, table.column_names))
        if not _can_label(table.features[wanted]):
            raise UserError(
                f"--label-column '{wanted}' of '{data}' holds neither integers nor strings",
                nearest_name("", [name for name, feature in table.features.items() if _can_label(feature)]),
            )
        return _take_column(table, wanted)
    usable = [name for name in LABEL_COLUMNS if name in table.features and _can_label(table.features[name])]
    declared = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    name = usable[0] if usable else declared[0] if len(declared) == 1 else None
    if name is None:
        return None
    column = _take_column(table, name)
    is_empty = column.values.data.column(0).null_count == len(table) if len(table) else True
    return None if is_empty else column


def _can_label(feature: object) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and ("int" in feature.dtype or "string" in feature.dtype)


def _take_column(table: datasets.Dataset, name: str) -> LabelColumn:
    feature = table.features[name]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else None
    return LabelColumn(values=table.select_columns([name]), names=names)
