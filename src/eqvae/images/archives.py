"""Images in uncompressed tar archives (WebDataset's layout), read in place: nothing is unpacked or copied."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, final

import pyarrow as pa

from eqvae.errors import UserError, printable
from eqvae.images.arrays import ARRAY_SUFFIXES
from eqvae.images.decoding import IMAGE_SUFFIXES, MAX_ENCODED_BYTES, is_image, may_be_image
from eqvae.images.folders import below_all, sort_by_folders
from eqvae.images.labels import text_labels
from eqvae.images.sources import Aside, ImageSource, Split, list_reasons

EVERY_IMAGE = "all"
"""`--image-column all` takes every image of a sample as one of its own."""

USUAL_NAMES = (
    "image", "img", "picture", "photo", "pixels", "rgb", "color", "colour", "original", "input",
    "jpg", "jpeg", "webp", "png",
)  # fmt: skip
"""What pictures are called among several of one sample, the likeliest first."""

_MAX_CLASS_BYTES = 256

_Key = tuple[str, str]
"""A member's folder, and its name without ending."""
_NUM_HEAD_BYTES = 4096


@final
@dataclass(frozen=True, kw_only=True)
class Members:
    """Members of archives."""

    archives: tuple[str, ...]

    table: pa.Table
    """Columns `archive`, a number, `member`, a name of any bytes, `offset` and `size`, both in bytes."""

    def __len__(self) -> int:
        return self.table.num_rows

    def content(self, index: int) -> bytes:
        archive, _, offset, size = self._row(index)
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"{size:,} bytes are more than the {MAX_ENCODED_BYTES:,} that a picture may have")
        with Path(archive).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def label(self, index: int) -> str:
        archive, member, _, _ = self._row(index)
        return f"{archive}[{member}]"

    def identities(self) -> Iterator[str]:
        for index in range(len(self)):
            archive, member, _, size = self._row(index)
            yield f"{Path(archive).name} {member} {size}"

    def _row(self, index: int) -> tuple[str, str, int, int]:
        archive, member, offset, size = (column[index].as_py() for column in self.table.columns)
        return self.archives[archive], os.fsdecode(member), offset, size


@final
@dataclass(frozen=True, kw_only=True)
class _Image:
    """A member that is an image."""

    name: str

    folder: str

    stem: str
    """Its name without folder and ending."""

    ending: str
    """In lower case, without the dot."""

    offset: int
    size: int

    order: int
    """Its place in the archive."""


@final
@dataclass(kw_only=True)
class _Listing:
    """What one archive holds."""

    images: dict[str, _Image] = field(default_factory=dict)
    """By name: of two members of one name the later one counts, as when an archive is unpacked."""

    arrays: dict[str, _Image] = field(default_factory=dict)
    """Members that are images where no archive holds others."""

    labels: dict[_Key, str] = field(default_factory=dict)
    """Text of the `.cls` members."""

    beside: set[_Key] = field(default_factory=set)
    """Where members lie that are no images: labels, captions, metadata."""

    left_out: Counter[str] = field(default_factory=Counter)


def open_archives(
    data: str,
    archives: Sequence[str],
    split: Split,
    *,
    is_labelled: bool,
    image_column: str | None,
    left_out: Mapping[str, int],
) -> ImageSource:
    """Index the images of tar archives: of each sample the picture, not its masks."""
    counted, choices = Counter(left_out), dict[str, None]()
    chosen: list[tuple[int, _Image, str | None]] = []
    listings = [_list_members(archive) for archive in archives]
    if not any(listing.images for listing in listings):
        listings = [replace(listing, images=listing.arrays, arrays={}) for listing in listings]
    for number, (archive, listing) in enumerate(zip(archives, listings, strict=True)):
        counted.update(suffix_reason(PurePosixPath(name)) for name in listing.arrays)
        counted.update(listing.left_out)
        for key, images in _samples(listing, image_column).items():
            picked = _pick(archive, key, images, image_column)
            for image in picked:
                text = listing.labels.get((image.folder, image.stem), listing.labels.get(key))
                chosen.append((number, image, text))
            beside = " and ".join(sorted({f".{_role(key, image)}" for image in picked}))
            for image in images:
                if image not in picked:
                    counted[f".{_role(key, image)} beside {beside}" if beside else "of other names"] += 1
                    choices["--image-column chooses another"] = None
    if not chosen:
        others = list_reasons(counted)
        raise UserError(
            f"'{printable(data)}' holds no image in {len(archives)} tar archive(s){others and f' ({others})'}",
            f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}, or are some by their first bytes",
        )
    parts = (PurePosixPath(image.folder).parts for _, image, _ in chosen)
    folders = below_all([tuple(part for part in each if part not in ("/", ".")) for each in parts])
    sorted_ = sort_by_folders(data, folders, split, is_labelled=is_labelled)
    counted.update(sorted_.left_out)
    kept = [chosen[index] for index in sorted_.kept]
    labels = (text_labels([text for _, _, text in kept]) if is_labelled else None) or sorted_.labels
    table = pa.table(
        {
            "archive": pa.array([number for number, _, _ in kept], pa.int32()),
            "member": pa.array([os.fsencode(image.name) for _, image, _ in kept], pa.large_binary()),
            "offset": pa.array([image.offset for _, image, _ in kept], pa.int64()),
            "size": pa.array([image.size for _, image, _ in kept], pa.int64()),
        }
    )
    aside = Aside(left_out=counted, unlabelled=sorted_.unlabelled, choice="; ".join(choices))
    return ImageSource(data, Members(archives=tuple(archives), table=table), labels, aside)


def _samples(listing: _Listing, image_column: str | None) -> dict[_Key, list[_Image]]:
    """Put the images of one sample together.

    What ends a sample's name is the last ending. More of it belongs to the image alone (`0000.mask.png`) where the
    sample's name without it is there (`0000.png`, `0000.json`), or where many samples have the same several.
    """
    images = list(listing.images.values())
    if image_column == EVERY_IMAGE:
        return {(image.folder, f"{image.stem}.{image.ending}"): [image] for image in images}
    plain = {(image.folder, image.stem) for image in images}
    words: dict[_Key, set[str]] = {}
    for image in images:
        name, _, word = image.stem.rpartition(".")
        if name and not word.isdecimal():
            words.setdefault((image.folder, name), set()).add(word)
    several = [frozenset(found) for found in words.values() if len(found) > 1]
    recurring = {found for found, count in Counter(several).items() if count > 1 or found & set(USUAL_NAMES)}
    samples: dict[_Key, list[_Image]] = {}
    for image in images:
        own, parts, sample = (image.folder, image.stem), image.stem.split("."), image.stem
        for length in range(1, len(parts)):
            key = (image.folder, ".".join(parts[:length]))
            is_word = not parts[length].isdecimal()
            if (
                key in plain
                or (is_word and key in listing.beside and own not in listing.beside)
                or (is_word and length == len(parts) - 1 and frozenset(words[key]) in recurring)
            ):
                sample = key[1]
                break
        samples.setdefault((image.folder, sample), []).append(image)
    return samples


def _role(key: _Key, image: _Image) -> str:
    """Say what an image is to its sample: `png`, or `mask.png`."""
    return printable(f"{image.stem[len(key[1]) + 1 :]}.{image.ending}".lstrip("."))


def _pick(archive: str, key: _Key, images: Sequence[_Image], image_column: str | None) -> list[_Image]:
    """Choose a sample's picture: what is asked for, else the one of the plain name, else the one called `image`."""
    if image_column == EVERY_IMAGE:
        return list(images)
    if image_column is not None:
        wanted = image_column.lower().lstrip(".")
        return [image for image in images if wanted in (role := _role(key, image), role.rpartition(".")[0])][:1]
    if len(images) == 1:
        return list(images)
    plain = [image for image in images if image.stem == key[1]]
    usual = {name: place for place, name in enumerate(USUAL_NAMES)}
    ranked = sorted(plain or images, key=lambda image: usual.get(_role(key, image).partition(".")[0], len(usual)))
    best = _role(key, ranked[0])
    if not plain and best.partition(".")[0] not in usual:
        roles = ", ".join(sorted(_role(key, image) for image in images))
        raise UserError(
            f"'{printable(archive)}' holds several images of each sample ({roles}) and none of a plain name",
            f"Choose one with --image-column, or take each for itself with --image-column {EVERY_IMAGE}",
        )
    return ranked[:1]


def _list_members(archive: str) -> _Listing:
    """List the members of one archive."""
    listing = _Listing()
    try:
        with Path(archive).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            num_bytes, last = os.fstat(file.fileno()).st_size, -1
            for order, member in enumerate(tar):
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > num_bytes:
                    raise tarfile.ReadError(f"member '{printable(member.name)}' does not lie inside")
                last = member.offset
                tar.members = []  # type: ignore[attr-defined] # else all of them stay in memory
                _sort_member(member, order, file, listing)
            _check_end(file, tar.offset)
    # Fields of a damaged header raise almost anything.
    except Exception as error:
        reason = printable(str(error) or type(error).__name__)
        raise UserError(
            f"'{printable(archive)}' is truncated or no uncompressed tar archive ({reason})", "Fetch it again"
        ) from None
    return listing


def _check_end(file: BinaryIO, offset: int) -> None:
    """Refuse an archive that goes on behind what tarfile takes for its end, or that has none: it tells no damage."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("its end is missing")
    while block:
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"it goes on after a damaged member, or after its end, at byte {offset}")
        block = file.read(1 << 20)


def _sort_member(member: tarfile.TarInfo, order: int, file: BinaryIO, listing: _Listing) -> None:
    """Take an image or a label, and count anything else."""
    path = PurePosixPath(member.name)
    suffix, is_array = path.suffix.lower(), path.suffix.lower() in ARRAY_SUFFIXES
    if member.isdir():
        return
    if any(part.startswith(".") and part not in (".", "..") for part in path.parts):
        listing.left_out["hidden"] += 1
    elif not member.isfile() or member.issparse():
        listing.left_out["links, devices or sparse files"] += 1
    elif suffix == ".cls":
        key = (str(path.parent), path.name[: -len(path.suffix)])
        listing.beside.add(key)
        if member.size > _MAX_CLASS_BYTES:  # cut off, two classes could be one
            listing.labels.pop(key, None)
            listing.left_out[f".cls of more than {_MAX_CLASS_BYTES} bytes"] += 1
            return
        file.seek(member.offset_data)
        text = file.read(member.size).decode(errors="backslashreplace")
        listing.labels[key] = printable(text.strip())
    elif is_array or suffix in IMAGE_SUFFIXES or _is_image_inside(file, member):
        images = listing.arrays if is_array else listing.images
        if images.pop(member.name, None) is not None:
            listing.left_out["replaced by a later member of the same name"] += 1
        # An ending that nobody knows is part of the name.
        ending = path.suffix if suffix in IMAGE_SUFFIXES or path.suffix[1:].isalpha() else ""
        images[member.name] = _Image(
            name=member.name, folder=str(path.parent), stem=path.name.removesuffix(ending) if ending else path.name,
            ending=ending[1:].lower(), offset=member.offset_data, size=member.size, order=order,
        )  # fmt: skip
        if is_array:
            listing.beside.add((str(path.parent), path.name[: len(path.name) - len(path.suffix)]))
    else:
        listing.left_out[suffix_reason(path)] += 1
        listing.beside.add((str(path.parent), path.name[: len(path.name) - len(path.suffix)]))


def suffix_reason(path: PurePosixPath) -> str:
    """Say what a file that is no image is called."""
    return printable(path.suffix.lower()) if path.suffix else "without ending"


def _is_image_inside(file: BinaryIO, member: tarfile.TarInfo) -> bool:
    file.seek(member.offset_data)
    head = file.read(min(member.size, _NUM_HEAD_BYTES))
    if not may_be_image(head):
        return False
    return is_image(head + file.read(max(0, min(member.size, MAX_ENCODED_BYTES) - len(head))))
