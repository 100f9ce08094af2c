"""Files under a folder or a glob, each once, and what their folders' names say: classes and splits."""

import fnmatch
import glob
import heapq
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import pyarrow as pa

from eqvae.artifacts.files import expanded, read_json
from eqvae.artifacts.names import CONFIG, ENVIRONMENT
from eqvae.errors import UserError, nearest_name, printable
from eqvae.images.labels import LabelColumn
from eqvae.images.sources import Split, num_bytes

SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training", "trainval"),
    "evaluation": ("validation", "valid", "val", "test", "testing", "eval", "dev", "holdout"),
}
"""Folders of these names alone are splits, not classes; the first that is there counts."""

_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095

_OTHER_SPLITS = frozenset(("unlabeled", "unlabelled", "extra"))

_MEANINGLESS = frozenset(("", "set", "split", "data", "image", "images", "img", "imgs", "clean"))
"""What may follow: `train2017`, `training_set`, `val_images`."""


def split_of(folder: str) -> str | None:
    """Tell which split a folder's name is that of; None where it is no split's."""
    word, *rest = re.split(r"[\W\d_]+", folder.lower())
    known = word in SPLITS["train"] or word in SPLITS["evaluation"] or word in _OTHER_SPLITS
    return word if known and _MEANINGLESS.issuperset(rest) else None


@final
@dataclass(frozen=True, kw_only=True)
class Files:
    """Image files."""

    paths: pa.Array
    """Bytes, which is what paths are; an array of them stays small in memory, and workers share it."""

    root: Path
    """A folder above all of them."""

    @classmethod
    def of(cls, paths: Sequence[str | Path], root: Path) -> "Files":
        """Hold some paths."""
        return cls(paths=pa.array([os.fsencode(path) for path in paths], pa.large_binary()), root=root)

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, index: int) -> Path:
        return Path(self.label(index))

    def label(self, index: int) -> str:
        return os.fsdecode(self.paths[index].as_py())

    def identities(self) -> Iterator[str]:
        for encoded in self.paths:
            path = Path(os.fsdecode(encoded.as_py()))
            yield f"{relative(path, self.root).as_posix()} {num_bytes(path)}"


@final
@dataclass(kw_only=True)
class Walk:
    """A walk through folders that meets each file once, however many links lead there.

    Hidden ones are left out, and what eqvae's own commands write: the pictures of a run would be data when it resumes.
    """

    named: str = ""
    """The folder that is asked for itself, which is read even where a command wrote it."""

    files: list[str] = field(default_factory=list)

    left_out: Counter[str] = field(default_factory=Counter)
    """Reason to number."""

    _seen: set[tuple[int, int]] = field(default_factory=set)
    """Device and inode of what was met."""

    _folders: list[str] = field(default_factory=list)

    _links: list[str] = field(default_factory=list)

    def under(self, top: str) -> None:
        """Walk through one folder. Links are followed when all that lies there by itself is known."""
        top_real = Path(top).resolve()
        above = {_identity(folder.stat()) for folder in top_real.parents}
        self.meet(top)
        while self._folders or self._links:
            while self._folders:
                self._list(self._folders.pop())
            if self._links:
                link = heapq.heappop(self._links)
                try:
                    self._meet(link, os.stat(link), above)  # noqa: PTH116
                except OSError:
                    self.left_out["links to nothing"] += 1

    def meet(self, path: str) -> None:
        """Take a file or a folder."""
        try:
            self._meet(path, os.stat(path), frozenset())  # noqa: PTH116 (a million paths)
        except OSError:
            self.left_out["links to nothing" if os.path.islink(path) else "that can't be read"] += 1  # noqa: PTH114

    def _list(self, folder: str) -> None:
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            self.left_out["folders that can't be read"] += 1
            return
        if folder != self.named and _is_run(folder, [entry.name for entry in entries]):
            self.left_out["folders of eqvae's runs"] += 1
            return
        first = len(self._folders)
        for entry in entries:
            if entry.name.startswith("."):
                self.left_out["hidden"] += 1
            elif entry.is_symlink():
                heapq.heappush(self._links, entry.path)
            else:
                try:
                    self._meet(entry.path, entry.stat(follow_symlinks=False), frozenset())
                except OSError:
                    self.left_out["that can't be read"] += 1
        self._folders[first:] = reversed(self._folders[first:])  # the last one is listed next

    def _meet(
        self, path: str, status: os.stat_result, above: frozenset[tuple[int, int]] | set[tuple[int, int]]
    ) -> None:
        kind, identity = status.st_mode & 0o170000, _identity(status)
        is_folder, is_file = kind == 0o040000, kind == 0o100000
        if is_folder and identity in above:
            self.left_out["links to folders above"] += 1
        elif identity in self._seen:
            self.left_out["links to folders met before" if is_folder else "met before under another name"] += 1
        elif is_folder:
            self._folders.append(path)
        elif is_file:
            self.files.append(path)
        else:
            self.left_out["pipes, sockets or devices"] += 1
        if status.st_ino:
            self._seen.add(identity)


def _is_run(folder: str, names: Sequence[str]) -> bool:
    """Whether a command of ours writes into a folder."""
    if CONFIG not in names or ENVIRONMENT not in names:
        return False
    try:
        return "command" in read_json(Path(folder, CONFIG))
    except (UserError, OSError):
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def list_files(data: str, kinds: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """List the files that a path or a glob names, in the order of their paths, and count what is left out."""
    path = expanded(data)
    # What no file can be called; an empty text would stand for the folder that one is in.
    longest = max(map(len, map(os.fsencode, path.parts)), default=0)
    if not data.strip() or "\0" in data or longest > _MAX_NAME_BYTES or len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise _missing(data[:_MAX_NAME_BYTES], kinds)
    walk = Walk(named=str(root_of(data)))
    if path.is_file():
        return [str(path)], walk.left_out
    if path.is_dir():
        walk.under(str(path))
    elif path.exists():
        raise UserError(f"Data '{printable(data)}' is neither a file nor a folder", "Give images")
    elif "**" in path.parts and root_of(data).is_dir():
        # Not `glob`, which goes round in circles where links do.
        walk.under(str(root_of(data)))
        num_shared = len(root_of(data).parts)
        pattern = path.parts[num_shared:]
        walk.files = [file for file in walk.files if _matches(Path(file).parts[num_shared:], pattern)]
        if not walk.files:
            raise _missing(data, kinds)
    else:
        found = sorted(glob.iglob(str(path)), key=_parts)  # noqa: PTH207
        for name in found:
            (walk.under if os.path.isdir(name) else walk.meet)(name)  # noqa: PTH112
        if not found:
            raise _missing(data, kinds)
    return sorted(walk.files, key=_parts), walk.left_out


def _missing(data: str, kinds: Sequence[str]) -> UserError:
    mend = nearest_name(data, kinds) if data.isalpha() else f"Check the path; data is one of: {', '.join(kinds)}"
    return UserError(f"Data '{printable(data)}' does not exist", mend)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Hold a path against a pattern; `**` stands for any folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _matches(parts, pattern[1:]):
        return True
    if not parts:
        return False
    if pattern[0] == "**":
        return _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _parts(name: str) -> list[str]:
    """Order names as `Path` does, of which there may be a million."""
    return name.split(os.sep)  # noqa: PTH206


def root_of(data: str) -> Path:
    """Find the folder under which a path's or a glob's files lie: class folders are directly under it."""
    path = expanded(data)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    wild = next((index for index, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts) - 1)
    return Path(*path.parts[:wild])


def relative(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else Path(path.name)


@final
@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Images by their folders: those of one split, and their classes."""

    kept: list[int]
    """Which of the images."""

    labels: LabelColumn | None

    unlabelled: str
    """Why there are no classes."""

    left_out: Counter[str]


def below_all(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Leave out the parts that all paths begin with."""
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(paths), max(paths), strict=False))
    num_shared = len(list(shared))
    return [parts[num_shared:] for parts in paths]


def sort_by_folders(
    data: str, folders: Sequence[tuple[str, ...]], split: Split, *, is_labelled: bool, choose_split: bool = True
) -> Sorted:
    """Tell splits from classes: folders called train, val, test, ... alone hold the splits, any others the classes."""
    kept, left_out = list(range(len(folders))), Counter[str]()
    tops = {folder[0] for folder in folders if folder}
    splits = {split_of(top) for top in tops}
    if splits and None not in splits and splits - _OTHER_SPLITS:
        if choose_split:
            chosen = min(tops) if len(tops) == 1 else _choose(data, tops, split)
            kept = [index for index, folder in enumerate(folders) if folder[:1] == (chosen,)]
            others = (folder[0] if folder else "" for folder in folders if folder[:1] != (chosen,))
            left_out.update(f"of the split '{printable(other)}'" if other else "beside the splits" for other in others)
        folders = [folder[1:] for folder in folders]
    if not is_labelled:
        return Sorted(kept=kept, labels=None, unlabelled="as asked", left_out=left_out)
    labels, unlabelled = _label([folders[index] for index in kept])
    return Sorted(kept=kept, labels=labels, unlabelled=unlabelled, left_out=left_out)


def _choose(data: str, tops: set[str], split: Split) -> str:
    by_name = {split_of(top): top for top in sorted(tops, reverse=True)}
    for name in SPLITS[split]:
        if name in by_name:
            return by_name[name]
    known = ", ".join(f"{data.rstrip('/')}/{top}" for top in sorted(tops))
    raise UserError(f"'{printable(data)}' has no split for {split}", f"Name one of: {known}")


def _label(folders: Sequence[tuple[str, ...]]) -> tuple[LabelColumn | None, str]:
    """Take the first folder of each image's path as its class."""
    names = [folder[0] if folder else None for folder in folders]
    flat = sum(name is None for name in names)
    found = {name for name in names if name is not None}
    if not found:
        return None, "they lie in no class folders"
    if flat:
        verb = "lies" if flat == 1 else "lie"
        return None, f"{flat:,} of the images {verb} beside the class folders"
    if len(found) < 2:
        return None, f"they all lie in one folder, '{printable(min(found))}'"
    # Names are bytes: those that are no text are written with escapes.
    return LabelColumn(
        values=pa.chunked_array([[printable(name) for name in names if name is not None]], pa.large_string())
    ), ""
