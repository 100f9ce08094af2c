"""A sequence of images, wherever they lie, their class labels, and what was left out on the way to them.

Labels come from folder names, a column of a table, or the `.cls` members of tar shards. They are checked when somebody
asks for them: work that needs no labels is not stopped by a wrong one.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Int64

from eqvae.artifacts.channels import describe_channels
from eqvae.errors import UserError, printable
from eqvae.images.bands import RGB, Decoded, Picture, Pixels
from eqvae.images.decoding import BrokenImageError, decode_and_tell, read_size
from eqvae.images.labels import Classes, LabelColumn
from eqvae.runtime.journal import say, say_once
from eqvae.runtime.processes import Processes

Split = Literal["train", "evaluation"]

_NUM_SHOWN = 3
_NUM_TRIED = 4
"""First images, of which one shows what is done to all."""

_MAX_REASONS = 5
_MAX_RECORDED_NAMES = 1000
_MAX_SHOWN_NAME = 40


@runtime_checkable
class Rows(Protocol):
    """Encoded images by index."""

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes | Path: ...

    def label(self, index: int) -> str: ...

    def identities(self) -> Iterator[str]: ...


@final
@dataclass(frozen=True, kw_only=True)
class Aside:
    """What a reader passed over or decided on the way to its images: nothing of it goes unsaid."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason to number of things."""

    unlabelled: str = ""
    """Why there are no classes."""

    choice: str = ""
    """What was chosen among several."""


@final
class ImageSource:
    """A sequence of images, each decoded when it is read. Pickles, so that loader workers can hold it."""

    def __init__(self, name: str, rows: Rows, labels: LabelColumn | None = None, aside: Aside | None = None) -> None:
        """Name the rows; `open_images` makes them."""
        self.name = name
        self._rows = rows
        self._labels = labels
        self._aside = aside or Aside()
        self._classes: Classes | None = None
        self.pixels = RGB
        """What images are read as."""
        self._done = ""
        self.is_small_said = False
        """Whether somebody was told that images are enlarged."""

    def __len__(self) -> int:
        """Count the images, broken ones included."""
        return len(self._rows)

    def read(self, index: int) -> Picture:
        """Decode one image."""
        return self._decode(index).picture

    def _decode(self, index: int) -> Decoded:
        return decode_and_tell(self.content(index), self.label(index), self.pixels)

    def read_as(self, pixels: Pixels, flag: str = "--data") -> "ImageSource":
        """Take the same images read otherwise, in other channels say; `flag` names them where they do not fit."""
        source = copy.copy(self)
        source.pixels, unfit = pixels, None
        for index in range(min(len(self), _NUM_TRIED)):
            try:
                source._done = source._decode(index).done
            except BrokenImageError as error:
                unfit = unfit or (error if error.mend else None)
            else:
                return source
        if unfit is not None:
            what = f"{flag} '{printable(self.name)}' can't be read: of '{unfit.image.name}', {unfit.image.reason}"
            raise UserError(what, unfit.mend)
        return source

    def size(self, index: int) -> tuple[int, int]:
        """Find an image's width and height in px, upright, from the header alone where that is enough."""
        content = self.content(index)
        try:
            return read_size(content)
        except Exception:  # metadata may stand before the size
            return self.read(index).size

    def content(self, index: int) -> bytes | Path:
        """Find one encoded image."""
        try:
            return self._rows.content(index)
        except Exception as error:  # a damaged table raises almost anything
            raise BrokenImageError(self.label(index), f"it cannot be read ({error})") from None

    def label(self, index: int) -> str:
        """Name one image, as it can be printed."""
        return printable(self._rows.label(index))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of their indices; None where the images have no labels."""
        classes = self._check_classes()
        return None if classes is None else classes.names

    @property
    def class_indices(self) -> Int64[np.ndarray, " n"] | None:
        """Classes of all images; None where they have no labels."""
        classes = self._check_classes()
        return None if classes is None else classes.indices

    def class_of(self, index: int) -> int | None:
        """Look up the class of one image."""
        classes = self._check_classes()
        return None if classes is None else int(classes.indices[index])

    def labelled_up_to(self, num_images: int) -> "ImageSource":
        """Take the same images with the classes that occur among the first ones alone."""
        source = copy.copy(self)
        source._labels = None if self._labels is None else self._labels.first(num_images)
        source._classes = None
        return source

    def fingerprint(self) -> str:
        """Digest names and sizes, wherever the data lie: 16 hexadecimal digits. No image is read."""
        return self._digest(self._rows.identities())

    def fingerprint_like(self, known: str | None) -> str:
        """Digest as `known` was made, where an older version digested otherwise and meant the same data."""
        former = getattr(self._rows, "former_identities", None)
        return known if known and former is not None and self._digest(former()) == known else self.fingerprint()

    def _digest(self, identities: Iterator[str]) -> str:
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        for identity in identities:
            digest.update(f"{identity}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def announce(self, title: str, processes: Processes, more: str = "") -> None:
        """Tell the user in one line what a command is about to read."""
        if processes.is_first:
            say(f"{title}: {self.describe()}" + (f"; {more}" if more else ""))

    def summary(self) -> dict[str, Any]:
        """Say what was found and what was left out, as a record."""
        names, unlabelled = None, self._aside.unlabelled
        try:
            names = self.class_names
        except UserError as error:  # whoever needs labels is stopped by it
            unlabelled = str(error).split(". Mend", 1)[0]
        return {
            "name": printable(self.name),
            "num_images": len(self),
            "num_classes": None if names is None else len(names),
            "class_names": None if names is None else [printable(name) for name in names[:_MAX_RECORDED_NAMES]],
            "unlabelled": unlabelled if names is None else "",
            "left_out": dict(self._aside.left_out),
            "choice": self._aside.choice,
            "pixels": self._done,
        }

    def describe(self) -> str:
        """Say the same in one line."""
        found, parts = self.summary(), [counted(len(self), "image")]
        if found["num_classes"] is None:
            parts.append(f"no classes ({found['unlabelled']})" if found["unlabelled"] else "no classes")
        else:
            parts.append(f"{counted(found['num_classes'], 'class')} ({list_names(found['class_names'])})")
        if left_out := found["left_out"]:
            parts.append(f"{sum(left_out.values()):,} left out ({list_reasons(left_out)})")
        pixels = f"first image: {found['pixels']}" if found["pixels"] else ""
        return "; ".join(filter(None, (", ".join(parts), found["choice"], pixels)))

    def _check_classes(self) -> Classes | None:
        if self._classes is None and self._labels is not None:
            self._classes = self._labels.classes(self.label)
        return self._classes


def announce_channels(num_channels: int) -> None:
    """Tell the user once what is made of channels other than three."""
    if line := describe_channels(num_channels):
        say_once(line)


def counted(count: int, noun: str) -> str:
    """Write a number with its noun."""
    plural = {"class": "classes"}.get(noun, f"{noun}s")
    return f"{count:,} {noun if count == 1 else plural}"


def list_reasons(left_out: Mapping[str, int]) -> str:
    """List how many were left out for each reason; of many reasons the commonest."""
    common = sorted(left_out, key=lambda reason: -left_out[reason])[:_MAX_REASONS]
    listed = [f"{left_out[reason]:,} {reason}" for reason in sorted(common)]
    others = sum(left_out.values()) - sum(left_out[reason] for reason in common)
    return ", ".join([*listed, f"{others:,} of other kinds"] if others else listed)


def list_names(names: Sequence[str]) -> str:
    """List the first of some names, as they can be printed."""
    shown = [printable(name[:_MAX_SHOWN_NAME]) for name in names[:_NUM_SHOWN]]
    return ", ".join([*shown[: _NUM_SHOWN - 1], "..."] if len(names) > _NUM_SHOWN else shown)


def num_bytes(path: Path) -> int:
    """Ask for a file's size."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
