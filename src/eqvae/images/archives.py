"""Images in uncompressed tar archives (WebDataset shards), read in place."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import datasets

from eqvae.images.decoding import IMAGE_SUFFIXES
from eqvae.runtime.errors import UserError


@final
@dataclass(frozen=True, kw_only=True)
class Members:
    """Members of uncompressed tar archives, read in place: nothing is unpacked or copied."""

    members: datasets.Dataset
    """Columns `archive`, `member`, `offset` and `size`, both in bytes."""

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


def open_archives(data: str, archives: Sequence[Path]) -> Members:
    """Index the images of tar archives."""
    members = [row for archive in archives for row in _list_members(archive)]
    if not members:
        raise UserError(
            f"'{data}' holds no image in {len(archives)} tar archive(s)",
            f"Images end in {', '.join(sorted(IMAGE_SUFFIXES))}",
        )
    return Members(members=datasets.Dataset.from_list(members))


def _list_members(archive: Path) -> Iterator[dict[str, Any]]:
    """List the images of one archive: the first of each WebDataset sample, so that masks beside it are left out."""
    last_sample = None
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                path = Path(member.name)
                sample = path.parent / path.name.partition(".")[0]
                hidden = any(part.startswith(".") for part in path.parts)
                if member.isfile() and not hidden and path.suffix.lower() in IMAGE_SUFFIXES and sample != last_sample:
                    last_sample = sample
                    row = {"member": member.name, "offset": member.offset_data, "size": member.size}
                    yield {"archive": str(archive), **row}
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"'{archive}' is truncated or no uncompressed tar archive ({error})", "Fetch it again"
        ) from None
