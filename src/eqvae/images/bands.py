"""Pictures of any number of channels and any depth, and how their numbers become 0 ... 255."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

from eqvae.errors import UserError

GREATEST = 255.0
"""What white is between decoding and the network, in 8-bit pictures and in deeper ones."""

Crop = UInt8[np.ndarray, "h w k"] | Float32[np.ndarray, "h w k"]
"""0 ... 255: 8-bit where the picture was, else not rounded."""

_COLOURS = {1: "grey", 3: "red, green and blue"}

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the transposition that undoes it."""


@final
@dataclass(frozen=True, kw_only=True)
class RangeConfig:
    """Which numbers are black and white where a picture has more than 8 bits."""

    white: float | None = None
    """The number that is white in images of more than 8 bits; brighter ones are clipped. None: the largest of their
    type, or of the bits that a TIFF states; floating-point numbers have none."""

    black: float | None = None
    """The number that is black there; None: 0."""

    def __post_init__(self) -> None:
        """Refuse a range without an inside."""
        black = self.black or 0.0
        if self.white is not None and not black < self.white < math.inf:
            raise UserError(f"--white {self.white:g} is not above --black {black:g}", "Give the number that is white")

    @property
    def is_stated(self) -> bool:
        """Whether the range was given."""
        return self.white is not None or self.black is not None


@final
@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What pictures are read as."""

    channels: int = 3
    """Those of the autoencoder: 1 is grey, 3 red, green and blue, others are taken as they are."""

    range: RangeConfig = RangeConfig()


class UnfitImageError(ValueError):
    """A sound picture that can't be what is asked for: another would be no better."""

    def __init__(self, what: str, mend: str) -> None:
        """Keep the mend, for the one line that refuses all of such pictures."""
        super().__init__(what)
        self.mend = mend


@final
class Bands:
    """A picture as one plane for each channel, with as much of `PIL.Image.Image` as cropping takes."""

    def __init__(self, planes: Sequence[Image.Image]) -> None:
        """Hold planes of one size, of 8 bits (L) or floating-point (F)."""
        self.planes = tuple(planes)
        self.width, self.height = self.size = self.planes[0].size

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, float, float, float] | None = None
    ) -> "Bands":
        """Resize each plane."""
        return Bands([plane.resize(size, resample, box=box) for plane in self.planes])

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """Cut out of each plane."""
        return Bands([plane.crop(box) for plane in self.planes])

    def transpose(self, method: Image.Transpose) -> "Bands":
        """Turn or mirror each plane."""
        return Bands([plane.transpose(method) for plane in self.planes])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Crop:
        """Stack the planes; bicubic weights, which can be negative, leave 0 ... 255 for no one to see."""
        del copy
        stacked = np.stack([np.asarray(plane) for plane in self.planes], axis=-1)
        stacked = stacked if stacked.dtype == np.uint8 else stacked.clip(0.0, GREATEST)
        return stacked if dtype is None else stacked.astype(dtype)


RGB = Pixels()
"""What pictures are read as where nobody says otherwise."""

Picture = Image.Image | Bands
"""A decoded picture: RGB of 8 bits, or planes."""


class Decoded(NamedTuple):
    """A picture, and what was done to it on the way."""

    picture: Picture

    done: str = ""
    """For the user's one line on the data; empty for red, green and blue of 8 bits."""


def to_range(
    values: Shaped[np.ndarray, "..."], stated: RangeConfig, *, num_bits: int | None = None, largest: float | None = None
) -> tuple[Shaped[np.ndarray, "..."], str]:
    """Scale numbers so that black is 0 and white is 255, and say what was taken for white.

    Numbers of 8 bits stay what they are; deeper ones become float32, and those beyond a stated range are clipped.
    `largest` is the picture's, of which these may be a part.
    """
    kind = values.dtype
    if kind == np.uint8 and num_bits in (None, 8):
        return values, "8 bits"
    if kind == np.bool_:
        return values * np.uint8(GREATEST), "1 bit"
    white, black = stated.white, stated.black or 0.0
    bits = num_bits or 8 * kind.itemsize
    if white is None and kind.kind == "u" and bits <= 16:
        white = float(2**bits - 1)
    if white is None:
        raise UnfitImageError(
            f"its {kind.name} numbers have no fixed range", "State the number that is white, as in --white 1"
        )
    if white <= black:
        raise UnfitImageError(f"its white, {white:g}, is not above --black {black:g}", "State --white too")
    if kind.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite numbers")
    name = kind.name if kind.kind == "f" else f"{bits} bits"
    found = f"{name}, {black:,.10g} is black and {white:,.10g} white"
    largest = float(values.max()) if largest is None else largest
    if not stated.is_stated and largest < white / 4:
        found += f" (its largest is {largest:,.10g}: --white sets another)"
    scaled = values.astype(np.float32)
    scaled -= np.float32(black)
    scaled *= np.float32(GREATEST / (white - black))
    return scaled.clip(0.0, GREATEST, out=scaled), found


def to_planes(bands: Shaped[np.ndarray, "h w k"], pixels: Pixels, *, num_bits: int | None = None) -> Decoded:
    """Make planes of an array's bands: as many as are asked for, grey where three are."""
    has, wanted = bands.shape[2], pixels.channels
    if has != wanted and (has, wanted) != (1, 3):
        raise wrong_channels(has, wanted)
    scaled, found = to_range(bands, pixels.range, num_bits=num_bits)
    planes = [Image.fromarray(np.ascontiguousarray(scaled[..., band])) for band in range(has)]
    return Decoded(Bands(planes * (wanted // has)), describe(has, wanted, found))


def describe(has: int, wanted: int, found: str) -> str:
    """Say what a picture's channels are, and become."""
    begin = _COLOURS.get(has, f"{has} channels") + (f" of {found}" if found else "")
    become = {(1, 3): ", repeated to red, green and blue", (3, 1): ", made grey by luma (ITU-R BT.601)"}
    return begin + become.get((has, wanted), "")


def wrong_channels(has: int, wanted: int) -> UnfitImageError:
    """Refuse a picture of another number of channels."""
    return UnfitImageError(
        f"it has {has} channel{'' if has == 1 else 's'}, and the autoencoder takes {wanted}",
        f"Give pictures of {wanted}, or an autoencoder of {has} ('eqvae convert AUTOENCODER NEW --channels {has}')",
    )
