"""DATA of the command line: built-in photographs, folders, tar shards; parquet and the Hugging Face hub in `tables.py`.

Every kind is held as a `datasets.Dataset` of paths, bytes or places in an archive, which stays small in memory however
many workers share it; decoding is ours (`decoding.py`).
"""

import glob
import os.path
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from eqvae.errors import UserError, nearest_name
from eqvae.images.decoding import IMAGE_SUFFIXES
from eqvae.images.sources import NO_LABELS, ImageSource, LabelColumn, Split, folder_labels, num_bytes, text_labels

if TYPE_CHECKING:
    import datasets  # see `sources.py`

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
    "evaluation": ("chelsea.webp", "rocket.jpg", "flower.jpg"),
}
"""In the folder `photographs`, whose CREDITS.md says where they are from."""

_HOME = Path(__file__).with_name("photographs")

_MAX_CLASS_BYTES = 256


@final
@dataclass(frozen=True, kw_only=True)
class _Files:
    """Image files."""

    paths: "datasets.Dataset"
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


@final
@dataclass(frozen=True, kw_only=True)
class _Members:
    """Members of uncompressed tar archives, read in place: nothing is unpacked or copied."""

    members: "datasets.Dataset"
    """Columns `archive`, `member`, `offset` and `size`, both in bytes, and `cls`, the text of the label beside it."""

    def __len__(self) -> int:
        return len(self.members)

    def content(self, index: int) -> bytes:
        row = self.members[index]
        with Path(row["archive"]).open("rb") as file:
            file.seek(row["offset"])
            return file.read(row["size"])

    def label(self, index: int) -> str:
        row = self.members[index]
        return f"{row['archive']}[{row['member']}]"

    def identities(self) -> Iterator[str]:
        for row in self.members:
            yield f"{Path(row['archive']).name} {row['member']} {row['size']}"

    def find_labels(self) -> LabelColumn | None:
        """Take the `.cls` members, or else the folders directly under the one that holds all members."""
        if (labels := text_labels(self.members["cls"][:])) is not None:
            return labels
        folders = [Path(member).parent for member in self.members["member"]]
        shared = os.path.commonpath(folders) if not any(folder.is_absolute() for folder in folders) else "/"
        return folder_labels([folder.relative_to(shared) for folder in folders])


def open_images(data: str, *, split: Split = "train", label_column: str | None = None) -> ImageSource:
    """Open DATA.

    Args:
        data: `photos`; an image, a folder of images, or a glob; `*.parquet` or `*.tar` (WebDataset layout), as a file,
            a folder or a glob; or `hf:NAME[:SPLIT]`. Folders are searched in depth, hidden files are left out, and the
            order is that of the paths.
        split: Which set of the photographs, or of a hub data set named without SPLIT; ignored otherwise.
        label_column: The column of a table that holds the labels; None looks for one, `none` leaves labels out. Files
            are labelled by the folders directly under DATA, members of archives by `.cls` members or else by folders.

    Returns:
        At least one image; which of them are broken shows when they are read, and wrong labels when they are.

    Raises:
        UserError: If nothing is there, or it holds no images or not that column, or the hub cannot be reached.
    """
    if data.startswith("hf:"):
        from eqvae.images.tables import open_hub

        return open_hub(data, split, label_column)
    if data == "photos":
        _check_no_table(data, label_column)
        return ImageSource(data, _to_files([_HOME / name for name in PHOTOGRAPHS[split]], _HOME))
    files = _list_files(data)
    by_suffix = {
        kind: [file for file in files if file.suffix.lower() in suffixes]
        for kind, suffixes in (("image", IMAGE_SUFFIXES), ("parquet", {".parquet"}), ("tar", {".tar"}))
    }
    if by_suffix["parquet"] and not by_suffix["image"]:
        from eqvae.images.tables import open_parquet

        return open_parquet(data, by_suffix["parquet"], label_column)
    _check_no_table(data, label_column)
    is_labelled = label_column != NO_LABELS
    if by_suffix["image"]:
        root = _root(data)
        labels = folder_labels([_relative(file, root).parent for file in by_suffix["image"]]) if is_labelled else None
        return ImageSource(data, _to_files(by_suffix["image"], root), labels)
    if by_suffix["tar"]:
        members = _open_archives(data, by_suffix["tar"])
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


def _to_files(paths: Sequence[Path], root: Path) -> _Files:
    import datasets

    return _Files(paths=datasets.Dataset.from_dict({"path": [str(path) for path in paths]}), root=root)


def _open_archives(data: str, archives: Sequence[Path]) -> _Members:
    """Index the images of tar archives."""
    import datasets

    members = [row for archive in archives for row in _list_members(archive)]
    if not members:
        raise UserError(
            f"'{data}' holds no image in {len(archives)} tar archive(s)",
            f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return _Members(members=datasets.Dataset.from_list(members))


def _list_members(archive: Path) -> list[dict[str, Any]]:
    """List the images of one archive: the first of each WebDataset sample, so that masks beside it are left out."""
    labels: dict[Path, str] = {}
    images: list[tuple[Path, dict[str, Any]]] = []
    last_sample = None
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                path = Path(member.name)
                sample = path.parent / path.name.partition(".")[0]
                if not member.isfile() or any(part.startswith(".") for part in path.parts):
                    continue
                if path.suffix.lower() in IMAGE_SUFFIXES and sample != last_sample:
                    last_sample = sample
                    row = {"member": member.name, "offset": member.offset_data, "size": member.size}
                    images.append((sample, {"archive": str(archive), **row}))
                elif path.suffix.lower() == ".cls" and (content := tar.extractfile(member)) is not None:
                    labels[sample] = content.read(_MAX_CLASS_BYTES).decode(errors="replace").strip()
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"'{archive}' is truncated or no uncompressed tar archive ({error})", "Fetch it again"
        ) from None
    return [row | {"cls": labels.get(sample)} for sample, row in images]
