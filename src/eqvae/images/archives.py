"""Images in uncompressed tar archives (WebDataset shards), read in place."""

import os.path
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import datasets

from eqvae.errors import UserError
from eqvae.images.decoding import IMAGE_SUFFIXES
from eqvae.images.labels import LabelColumn, folder_labels, text_labels

_CLASS_SUFFIX = ".cls"
_MAX_CLASS_BYTES = 256


@final
@dataclass(frozen=True, kw_only=True)
class Members:
    """Members of uncompressed tar archives, read in place: nothing is unpacked or copied."""

    members: datasets.Dataset
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


def open_archives(data: str, archives: Sequence[Path]) -> Members:
    """Index the images of tar archives."""
    members = [row for archive in archives for row in _list_members(archive)]
    if not members:
        raise UserError(
            f"'{data}' holds no image in {len(archives)} tar archive(s)",
            f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return Members(members=datasets.Dataset.from_list(members))


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
                elif path.suffix.lower() == _CLASS_SUFFIX and (content := tar.extractfile(member)) is not None:
                    labels[sample] = content.read(_MAX_CLASS_BYTES).decode(errors="replace").strip()
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"'{archive}' is truncated or no uncompressed tar archive ({error})", "Fetch it again"
        ) from None
    return [row | {"cls": labels.get(sample)} for sample, row in images]
