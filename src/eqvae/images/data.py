"""DATA of the command line: photographs, folders (`folders.py`), tar shards (`archives.py`), tables (`tables.py`).

Every kind is held as paths, bytes or places in a file, which stay small in memory however many workers share them;
decoding is ours (`decoding.py`).
"""

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from eqvae.artifacts.files import expanded
from eqvae.errors import UserError, printable
from eqvae.images.arrays import ARRAY_SUFFIXES
from eqvae.images.decoding import IMAGE_SUFFIXES, is_image
from eqvae.images.folders import Files, below_all, list_files, relative, root_of, sort_by_folders, split_of
from eqvae.images.labels import NO_LABELS
from eqvae.images.sources import Aside, ImageSource, Split

KINDS = ("photos", "an image folder", "*.npy", "*.parquet", "*.tar", "hf:NAME[/CONFIGURATION][:SPLIT]")
"""What DATA can be."""

TEXT_TABLES = frozenset((".csv", ".tsv", ".json", ".jsonl"))
"""Given by mistake for the pictures that they list."""

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (
        "hubble_deep_field.jpg",
        "motorcycle_left.webp",  # the two motorcycles are a stereo pair: never one in each set
        "motorcycle_right.webp",
        "china.jpg",
        "flower.jpg",
        "rocket.jpg",
    ),
    "evaluation": ("chelsea.webp", "astronaut.webp", "coffee.webp"),
}
"""In the folder `photographs`, whose CREDITS.md says where they are from."""

_HOME = Path(__file__).with_name("photographs")

_NUMBER_OF_PART = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")
"""What tells the parts of one split from each other, as in `train-00000-of-00002`."""


def open_images(
    data: str, *, split: Split = "train", label_column: str | None = None, image_column: str | None = None
) -> ImageSource:
    """Open DATA.

    Args:
        data: `photos`; an image, a folder of images, or a glob; `*.parquet` or `*.tar` (WebDataset layout), as a file,
            a folder or a glob; or `hf:NAME[/CONFIGURATION][:SPLIT]`. Folders are searched in depth, each file counts
            once, hidden ones are left out, and the order is that of the paths. An image is what its ending or its first
            bytes say; arrays, `.npy` or `.npz`, are images where there are no others.
        split: Which set of the photographs, of a hub data set named without SPLIT, or of a folder that holds folders,
            tables or archives called `train`, `val`, `test`, ... alone; ignored otherwise.
        label_column: The column of a table that holds the labels; None looks for one, `none` leaves labels out. Files
            are labelled by the folders directly under DATA, members of archives by `.cls` members or else by folders.
        image_column: The column of a table, or the ending of a tar sample's members (`mask.png`), that holds the
            images; None takes the usual one; `all`, for archives, takes every image.

    Returns:
        At least one image; which of them are broken shows when they are read, and wrong labels when they are. Its
        `describe()` says what was found, left out and chosen.

    Raises:
        UserError: If nothing is there, or it holds no images or not that column, or the hub cannot be reached.
    """
    if data.startswith("hf:"):
        from eqvae.images.hub import open_hub

        return open_hub(data, split, label_column, image_column)
    if data == "photos":
        _check_no_table(data, label_column, image_column)
        aside = Aside(unlabelled="photographs")
        return ImageSource(data, Files.of([_HOME / name for name in PHOTOGRAPHS[split]], _HOME), aside=aside)
    files, left_out = list_files(data, KINDS)
    images, tables, archives, others = _sort_files(files)
    if tables and not images:
        from eqvae.images.tables import open_parquet

        left_out.update(_name_ending(file) for file in archives + others)
        tables = _of_split(data, tables, split, left_out)
        return open_parquet(data, [Path(file) for file in tables], label_column, image_column, left_out)
    if images:
        _check_no_table(data, label_column, image_column)
        left_out.update(_name_ending(file) for file in tables + archives + others)
        return _open_files(data, images, split, left_out, is_labelled=label_column != NO_LABELS)
    if archives:
        from eqvae.images.archives import open_archives

        _check_no_table(data, label_column, None)
        left_out.update(map(_name_ending, others))
        archives = _of_split(data, archives, split, left_out)
        is_labelled = label_column != NO_LABELS
        return open_archives(
            data, archives, split, is_labelled=is_labelled, image_column=image_column, left_out=left_out
        )
    arrays = [file for file in others if PurePosixPath(file).suffix.lower() in ARRAY_SUFFIXES]
    if arrays:
        _check_no_table(data, label_column, image_column)
        left_out.update(_name_ending(file) for file in set(others).difference(arrays))
        return _open_files(data, arrays, split, left_out, is_labelled=label_column != NO_LABELS)
    num_others = len(files) + left_out.total()
    texts = {PurePosixPath(file).suffix.lower() for file in others} & TEXT_TABLES
    if texts and len(others) == num_others:
        raise UserError(
            f"'{printable(data)}' holds no image but {', '.join(sorted(texts))}, and a list of names is not read",
            "Give the folder that the pictures lie in, or the table as .parquet",
        )
    raise UserError(
        f"'{printable(data)}' holds no image ({num_others} other file{'' if num_others == 1 else 's'})",
        f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}, or are some by their first bytes; arrays end in "
        ".npy or .npz; tables in .parquet; archives in .tar, uncompressed",
    )


def _sort_files(files: list[str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """Tell images, tables, archives and other files apart: by their endings, or images by their first bytes."""
    images, tables, archives, others = list[str](), list[str](), list[str](), list[str]()
    for file in files:
        suffix = PurePosixPath(file).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(file)
        elif suffix == ".parquet":
            tables.append(file)
        elif suffix == ".tar":
            archives.append(file)
        else:
            (images if is_image(Path(file)) else others).append(file)
    return images, tables, archives, others


def _of_split(data: str, files: list[str], split: Split, left_out: Counter[str]) -> list[str]:
    """Keep the tables or archives of one split, where their folders or names say which is which."""
    if not expanded(data).is_dir():  # a glob or a file says which ones are meant
        return files
    root = root_of(data)
    paths = [relative(Path(file), root) for file in files]
    names = below_all([(*path.parent.parts, _NUMBER_OF_PART.sub("", path.stem)) for path in paths])
    # Of files the split's word alone counts: `train-0` and `train-1` are parts of one.
    words = [(f"{split_of(name[0])}*",) if len(name) == 1 and split_of(name[0]) else name for name in names]
    found = sort_by_folders(data, words, split, is_labelled=False)
    left_out.update(found.left_out)
    return [files[index] for index in found.kept]


def _name_ending(file: str) -> str:
    suffix = PurePosixPath(file).suffix.lower()
    return printable(suffix) if suffix else "without ending"


def _open_files(
    data: str, images: list[str], split: Split, left_out: Counter[str], *, is_labelled: bool
) -> ImageSource:
    root = root_of(data)
    folders = [relative(Path(image), root).parent.parts for image in images]
    # A glob or a file says which ones are meant.
    is_folder = expanded(data).is_dir()
    found = sort_by_folders(data, folders, split, is_labelled=is_labelled, choose_split=is_folder)
    files = Files.of([images[index] for index in found.kept], root)
    aside = Aside(left_out=left_out + found.left_out, unlabelled=found.unlabelled)
    return ImageSource(data, files, found.labels, aside)


def _check_no_table(data: str, label_column: str | None, image_column: str | None) -> None:
    for flag, column in (("--label-column", label_column), ("--image-column", image_column)):
        if column is not None and not (flag == "--label-column" and column == NO_LABELS):
            mend = (
                f"Leave it out, or give '{NO_LABELS}' to ignore labels" if flag == "--label-column" else "Leave it out"
            )
            raise UserError(f"{flag} '{column}': '{printable(data)}' is no table and has no columns", mend)
