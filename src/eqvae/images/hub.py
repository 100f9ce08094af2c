"""Images in data sets of the Hugging Face hub, or of its local cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import final

import datasets
import pyarrow as pa
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from eqvae.errors import UserError
from eqvae.images.columns import Columns, cell_to_content, choose_images, choose_labels, filled
from eqvae.images.folders import SPLITS
from eqvae.images.sources import Aside, ImageSource, Split
from eqvae.images.tables import class_names

_CONVERTED = "refs/convert/parquet"
"""The hub's own branch of a data set, as parquet files: what a data set that is a program is read from."""


@final
@dataclass(frozen=True, kw_only=True)
class HubRows:
    """The image column of a data set of the hub."""

    table: datasets.Dataset
    """That column alone, not decoded."""

    name: str

    def __len__(self) -> int:
        return len(self.table)

    def content(self, index: int) -> bytes | Path:
        return filled(cell_to_content(self.table[index][self.table.column_names[0]], Path()))

    def label(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def identities(self) -> Iterator[str]:
        sizes = sorted((name, split.num_bytes) for name, split in (self.table.info.splits or {}).items())
        yield f"{self.name} {len(self.table)} {sizes}"

    def former_identities(self) -> Iterator[str]:
        """What older caches knew the data by."""
        yield f"{Path(self.name).name} {len(self.table)} 0"


def hub_columns(table: datasets.Dataset) -> Columns:
    """See the columns of a data set."""

    def contents(name: str) -> Iterator[bytes | Path | None]:
        feature, column = table.features[name], table.select_columns([name])
        if isinstance(feature, datasets.Image):
            column = column.cast_column(name, datasets.Image(decode=False))
        return (cell_to_content(row[name], Path()) for row in column)

    def read(name: str) -> list[pa.ChunkedArray]:
        return [table.select_columns([name]).with_format("arrow")[:].column(0)]

    schema = table.features.arrow_schema
    return Columns(
        kinds={name: schema.field(name).type for name in schema.names}, declared=class_names(table.features),
        contents=contents, read=read,
    )  # fmt: skip


def open_hub(data: str, split: Split, label_column: str | None, image_column: str | None = None) -> ImageSource:
    """Open `hf:OWNER/NAME[/CONFIGURATION][:SPLIT]`."""
    repository, _, hub_split = data.removeprefix("hf:").partition(":")
    owner_and_name = PurePosixPath(repository).parts[:2]
    name, configuration = "/".join(owner_and_name), "/".join(PurePosixPath(repository).parts[2:]) or None
    mend = "DATA is hf:NAME[/CONFIGURATION][:SPLIT]"
    try:
        validate_repo_id(name)  # else `datasets` takes it for a folder of this machine
    except HFValidationError:
        raise UserError(f"'{data}' names no data set of the hub", mend) from None
    datasets.disable_progress_bars()
    try:
        table, hub_split = _load(data, name, configuration, hub_split, split)
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
        reason = " ".join(str(error).split())
        raise UserError(f"'{data}' cannot be opened ({reason})", mend) from None
    columns = hub_columns(table)
    column, choice = choose_images(data, columns, image_column)
    labels, unlabelled, label_choice = choose_labels(data, columns, label_column)
    images = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    choice = "; ".join(filter(None, (choice, label_choice)))
    rows = HubRows(table=images, name=f"hf:{repository}:{hub_split}")
    return ImageSource(data, rows, labels, Aside(unlabelled=unlabelled, choice=choice))


def _load(
    data: str, name: str, configuration: str | None, hub_split: str, split: Split
) -> tuple[datasets.Dataset, str]:
    """Load a split; of a data set that is a program, which `datasets` runs no more, the hub's conversion."""
    try:
        hub_split = hub_split or _choose_split(data, datasets.get_dataset_split_names(name, configuration), split)
        return datasets.load_dataset(name, configuration, split=hub_split), hub_split
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    files, root = HfFileSystem(), f"datasets/{name}@{_CONVERTED}"
    configuration = configuration or _only(data, _names(files, root))
    hub_split = hub_split or _choose_split(data, _names(files, f"{root}/{configuration}"), split)
    parts = [f"hf://{path}" for path in files.glob(f"{root}/{configuration}/{hub_split}/*.parquet")]
    return datasets.load_dataset("parquet", data_files={hub_split: sorted(parts)}, split=hub_split), hub_split


def _names(files: HfFileSystem, folder: str) -> list[str]:
    found = [each for each in files.ls(folder, detail=True) if isinstance(each, dict) and each["type"] == "directory"]
    return sorted(PurePosixPath(each["name"]).name for each in found)


def _only(data: str, configurations: Sequence[str]) -> str:
    """Take the single configuration, and choose none of several."""
    if len(configurations) == 1:
        return configurations[0]
    raise UserError(
        f"'{data}' has several configurations", f"Name one of: {', '.join(f'{data}/{each}' for each in configurations)}"
    )


def _choose_split(data: str, names: Sequence[str], split: Split) -> str:
    """Choose the hub's split for training or for evaluation."""
    for name in SPLITS[split]:
        if name in names:
            return name
    raise UserError(f"'{data}' has no split for {split}", f"Name one of: {', '.join(f'{data}:{n}' for n in names)}")
