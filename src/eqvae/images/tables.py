"""Images in parquet files, read in place."""

import contextlib
import hashlib
import itertools
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from eqvae.artifacts.files import write_atomically
from eqvae.errors import UserError, printable
from eqvae.images.columns import (
    NUM_PROBED_CELLS,
    Columns,
    cell_to_content,
    choose_images,
    choose_labels,
    filled,
    is_encoded,
)
from eqvae.images.sources import Aside, ImageSource, num_bytes
from eqvae.runtime.journal import say

_MAX_KEPT_BYTES = 2**28
"""Of decoded row groups, in each process."""

_MAX_GROUP_BYTES = 2**26
"""A table that holds more in one row group, and more than may be kept, is unpacked once: to read one image of it would
be to read that group."""

_UNPACKED_ROWS = 64


class _Groups:
    """One table's image column by row groups."""

    def __init__(self, path: Path, column: str) -> None:
        self._file: Any = None
        self.path, self.column = path, column

    def open(self) -> Any:
        """Open it in the process that reads."""
        if self._file is None:
            if self.path.suffix == ".arrow":
                self._file = pa.ipc.open_file(pa.memory_map(str(self.path)))
            else:
                self._file = pq.ParquetFile(self.path, memory_map=True)
        return self._file

    def counts(self) -> list[int]:
        """Rows of each group."""
        file = self.open()
        if isinstance(file, pq.ParquetFile):
            return [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        return [file.get_batch(index).num_rows for index in range(file.num_record_batches)]

    def read(self, group: int) -> pa.ChunkedArray | pa.Array:
        file = self.open()
        if isinstance(file, pq.ParquetFile):
            return file.read_row_group(group, columns=[self.column], use_threads=False).column(0)
        return file.get_batch(group).column(0)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: a worker opens its own."""
        return vars(self) | {"_file": None}


@final
@dataclass(kw_only=True)
class ParquetRows:
    """The image column of parquet files, which are read where they lie; the row groups read last are kept."""

    tables: tuple[_Groups, ...]

    parts: tuple[str, ...]
    """Names of the files."""

    ends: tuple[int, ...]
    """Row after the last of each file."""

    sizes: tuple[int, ...]
    """Bytes of each file."""

    group_ends: tuple[tuple[int, ...], ...]
    _kept: OrderedDict[tuple[int, int], Any] = field(default_factory=OrderedDict)
    _one_at_a_time: Any = field(default_factory=threading.Lock)
    """A parquet file's reader takes one thread; what it reads is decoded by many."""

    def __len__(self) -> int:
        return self.ends[-1]

    def content(self, index: int) -> bytes | Path:
        part, row = self._place(index)
        group = bisect_right(self.group_ends[part], row)
        row -= self.group_ends[part][group - 1] if group else 0
        with self._one_at_a_time:
            cell = self._group(part, group)[row].as_py()
        return filled(cell_to_content(cell, Path(self.parts[part]).parent))

    def label(self, index: int) -> str:
        part, row = self._place(index)
        return f"{self.parts[part]}[{row}]"

    def identities(self) -> Iterator[str]:
        for part, end, size in zip(self.parts, self.ends, self.sizes, strict=True):
            yield f"{Path(part).name} {end} {size}"

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def _group(self, part: int, group: int) -> Any:
        if (part, group) not in self._kept:
            self._kept[part, group] = self.tables[part].read(group)
            while len(self._kept) > 1 and sum(cells.nbytes for cells in self._kept.values()) > _MAX_KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((part, group))
        return self._kept[part, group]

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was read behind."""
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "_one_at_a_time")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with nothing read."""
        vars(self).update(state, _kept=OrderedDict(), _one_at_a_time=threading.Lock())


def open_parquet(
    data: str,
    files: Sequence[Path],
    label_column: str | None,
    image_column: str | None = None,
    left_out: Mapping[str, int] | None = None,
) -> ImageSource:
    """Open parquet files in place."""
    opened = [(file, _open_table(file)) for file in files]
    opened = [(file, table) for file, table in opened if table.metadata.num_rows]
    if not opened:
        raise UserError(f"'{printable(data)}' has no rows", "Give a table with images")
    with _reading(data):
        columns = parquet_columns(opened)
        column, choice = choose_images(data, columns, image_column)
        _check_alike([table for _, table in opened], column)
        labels, unlabelled, label_choice = choose_labels(data, columns, label_column)
        tables = [_in_place(file, table, column) for file, table in opened]
        counts = [table.counts() for table in tables]
    rows = ParquetRows(
        tables=tuple(tables),
        parts=tuple(str(file) for file, _ in opened),
        ends=tuple(accumulate(map(sum, counts))),
        sizes=tuple(num_bytes(file) for file, _ in opened),
        group_ends=tuple(tuple(accumulate(each)) for each in counts),
    )
    choice = "; ".join(filter(None, (choice, label_choice)))
    return ImageSource(data, rows, labels, Aside(left_out=left_out or {}, unlabelled=unlabelled, choice=choice))


@contextlib.contextmanager
def _reading(data: str) -> Iterator[None]:
    """Turn what damaged or differing tables raise into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = printable(str(error) or type(error).__name__)
        what = f"'{printable(data)}' cannot be read as parquet ({reason})"
        raise UserError(what, "Do its files share one schema?") from None


def _open_table(file: Path) -> pq.ParquetFile:
    """Open one file, or refuse it by name."""
    try:
        with file.open("rb") as opened:
            head = opened.read(4)
            opened.seek(max(0, file.stat().st_size - 4))
            tail = opened.read(4)
    except OSError as error:
        raise UserError(
            f"'{printable(str(file))}' cannot be read ({error.strerror})", "Check its permissions"
        ) from None
    if (head, tail) != (b"PAR1", b"PAR1"):
        raise UserError(f"'{printable(str(file))}' is truncated or no parquet file", "Fetch or write it again")
    with _reading(str(file)):
        return pq.ParquetFile(file, memory_map=True)


def _check_alike(tables: Sequence[pq.ParquetFile], column: str) -> None:
    """Hold the image column of every file to one kind; a file in which all of it is empty has none."""
    for schema in (table.schema_arrow for table in tables):
        if column not in schema.names:
            raise ValueError(f"a file has no column '{column}'")
        kind = schema.field(column).type
        if not (is_encoded(kind) or pa.types.is_null(kind)):
            raise ValueError(f"column '{column}' holds {kind} in a file")


def _in_place(file: Path, table: pq.ParquetFile, column: str) -> _Groups:
    """Read a file where it lies, unless to read one image of it were to read gigabytes: then it is unpacked once."""
    groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
    sizes = [_num_column_bytes(group, column) for group in groups]
    if max(sizes) <= _MAX_GROUP_BYTES or sum(sizes) <= _MAX_KEPT_BYTES:
        return _Groups(file, column)
    status = file.stat()
    # Where it lies does not matter: a file that was moved is not unpacked again.
    identity = f"{status.st_size} {status.st_mtime_ns} {column} {table.metadata.to_dict()}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eqvae" / "tables"
    unpacked = home / f"{hashlib.sha256(identity.encode(errors='replace')).hexdigest()[:32]}.arrow"
    if not unpacked.exists():
        say(f"'{printable(str(file))}' has row groups of {max(sizes) / 1e6:,.0f} MB: unpacked once, to '{unpacked}'")
        try:
            home.mkdir(parents=True, exist_ok=True)
            write_atomically(unpacked, partial(_unpack, table, column))
        except OSError as error:
            raise UserError(
                f"'{printable(str(file))}' cannot be unpacked to '{home}' ({error.strerror})",
                "Make room, set XDG_CACHE_HOME, or write it with row groups of some hundred images",
            ) from None
    return _Groups(unpacked, column)


def _num_column_bytes(group: Any, column: str) -> int:
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _unpack(table: pq.ParquetFile, column: str, path: Path) -> None:
    batches = table.iter_batches(batch_size=_UNPACKED_ROWS, columns=[column], use_threads=False)
    first = next(batches)
    with pa.ipc.new_file(str(path), first.schema) as writer:
        for batch in itertools.chain((first,), batches):
            writer.write_batch(batch)


def parquet_columns(files: Sequence[tuple[Path, pq.ParquetFile]]) -> Columns:
    """See the columns of parquet files, which must have the same."""
    schemas = [table.schema_arrow for _, table in files]
    kinds: dict[str, pa.DataType] = {}
    for name in schemas[0].names:
        found = [schema.field(name).type for schema in schemas if name in schema.names]
        kinds[name] = next((kind for kind in found if not pa.types.is_null(kind)), found[0])

    def contents(name: str) -> Iterator[bytes | Path | None]:
        for file, table in files:
            for batch in table.iter_batches(batch_size=NUM_PROBED_CELLS, columns=[name], use_threads=False):
                yield from (cell_to_content(cell, file.parent) for cell in batch.column(0).to_pylist())

    def read(name: str) -> list[pa.ChunkedArray]:
        return [table.read(columns=[name], use_threads=False).column(0) for _, table in files]

    names = [_declared_names(schema) for schema in schemas]
    return Columns(
        kinds=kinds, declared=names[0] if all(each == names[0] for each in names) else {}, contents=contents, read=read
    )


def _declared_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Find the class names that `datasets` wrote beside a table's schema."""
    try:
        return class_names(datasets.Features.from_arrow_schema(schema))
    except Exception:  # metadata of another program, or damaged: the columns are there all the same
        return {}


def class_names(features: datasets.Features) -> dict[str, tuple[str, ...]]:
    """Collect the class names of each column that has them."""
    labels = {name: feature for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    return {name: tuple(map(str, label.names or ())) for name, label in labels.items()}
