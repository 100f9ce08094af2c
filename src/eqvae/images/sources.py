"""Where images come from: built-in photographs, folders, parquet, tar shards, the Hugging Face hub.

Every kind is held as a `datasets.Dataset` of paths, bytes or places in an archive, which stays small in memory however
many workers share it; decoding is ours (`decoding.py`).
"""

import glob
import importlib.util
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, final, runtime_checkable

import datasets
from PIL import Image

from eqvae.images.archives import open_archives
from eqvae.images.decoding import IMAGE_SUFFIXES, BrokenImageError, decode_image, is_image
from eqvae.runtime.errors import UserError, nearest_name

Split = Literal["train", "evaluation"]

KINDS = ("photos", "an image folder", "*.parquet", "*.tar", "hf:NAME[:SPLIT]")
"""What DATA can be."""

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/coffee.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/motorcycle_left.png",  # the two motorcycles are a stereo pair: never one in each set
        "skimage/data/motorcycle_right.png",
        "sklearn/datasets/images/china.jpg",
    ),
    "evaluation": (
        "skimage/data/chelsea.png",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/flower.jpg",
    ),
}
"""The colour photographs in the wheels of scikit-image and scikit-learn; not those through a microscope or an eye."""

_EVALUATION_SPLITS = ("validation", "valid", "val", "test")
_NUM_PROBED_ROWS = 16


@runtime_checkable
class _Rows(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes | Path: ...

    def label(self, index: int) -> str: ...


@final
class ImageSource:
    """A sequence of images, each decoded when it is read. Pickles, so that loader workers can hold it."""

    def __init__(self, name: str, rows: _Rows) -> None:
        """Name the rows; `open_images` makes them.

        Args:
            name: DATA, as the user gave it.
            rows: Encoded images and their names.
        """
        self.name = name
        self._rows = rows

    def __len__(self) -> int:
        """Count the images, broken ones included."""
        return len(self._rows)

    def read(self, index: int) -> Image.Image:
        """Decode one image.

        Args:
            index: 0 ... len - 1.

        Returns:
            An image of mode RGB; see `decode_image`.

        Raises:
            BrokenImageError: If it cannot be read or decoded; the line names the file or the row.
        """
        label = self.label(index)
        try:
            content = self._rows.content(index)
        except (OSError, ValueError) as error:
            raise BrokenImageError(f"'{label}' cannot be read: {error}") from None
        return decode_image(content, label)

    def label(self, index: int) -> str:
        """Name one image.

        Args:
            index: 0 ... len - 1.

        Returns:
            Its path, or the file and the row or member: `train.parquet[17]`, `shard.tar[n01440764_36.jpg]`.
        """
        return self._rows.label(index)


@final
@dataclass(frozen=True, kw_only=True)
class _Files:
    """Image files."""

    paths: datasets.Dataset
    """Column `path`."""

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, index: int) -> Path:
        return Path(self.label(index))

    def label(self, index: int) -> str:
        return self.paths[index]["path"]


@final
@dataclass(frozen=True, kw_only=True)
class _Column:
    """The image column of one or several tables."""

    table: datasets.Dataset
    """That column alone, not decoded."""

    parts: tuple[str, ...]
    """Names of the tables that were joined."""

    ends: tuple[int, ...]
    """Row after the last of each part."""

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


def open_images(data: str, *, split: Split = "train") -> ImageSource:
    """Open DATA.

    Args:
        data: `photos`; an image, a folder of images, or a glob; `*.parquet` or `*.tar` (WebDataset layout), as a file,
            a folder or a glob; or `hf:NAME[:SPLIT]`. Folders are searched in depth, hidden files are left out, and the
            order is that of the paths.
        split: Which set of the photographs, or of a hub data set named without SPLIT; ignored otherwise.

    Returns:
        At least one image; which of them are broken shows when they are read.

    Raises:
        UserError: If nothing is there, or it holds no images, or the hub cannot be reached.
    """
    if data == "photos":
        return ImageSource(data, _files_to_rows(_find_photographs(split)))
    if data.startswith("hf:"):
        return ImageSource(data, _open_hub(data, split))
    files = _list_files(data)
    by_suffix = {
        kind: [file for file in files if file.suffix.lower() in suffixes]
        for kind, suffixes in (("image", IMAGE_SUFFIXES), ("parquet", {".parquet"}), ("tar", {".tar"}))
    }
    if by_suffix["image"]:
        return ImageSource(data, _files_to_rows(by_suffix["image"]))
    if by_suffix["parquet"]:
        return ImageSource(data, _open_parquet(data, by_suffix["parquet"]))
    if by_suffix["tar"]:
        return ImageSource(data, open_archives(data, by_suffix["tar"]))
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


def _find_photographs(split: Split) -> list[Path]:
    """Locate the built-in photographs without importing the packages that carry them."""
    photographs = []
    for name in PHOTOGRAPHS[split]:
        package, _, rest = name.partition("/")
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / rest if spec and spec.origin else None
        if path is None or not path.is_file():
            raise UserError(f"The photograph '{name}' is not installed", "pip install scikit-image scikit-learn")
        photographs.append(path)
    return photographs


def _files_to_rows(paths: Sequence[Path]) -> _Files:
    return _Files(paths=datasets.Dataset.from_dict({"path": [str(path) for path in paths]}))


def _open_parquet(data: str, files: Sequence[Path]) -> _Column:
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
    table = _select_images(data, datasets.concatenate_datasets(tables))
    return _Column(table=table, parts=tuple(map(str, files)), ends=tuple(accumulate(lengths)))


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


def _open_hub(data: str, split: Split) -> _Column:
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
    return _Column(table=_select_images(data, table), parts=(f"hf:{name}:{hub_split}",), ends=(len(table),))


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
