"""Pillow's modes to channels: upright, transparency on white, grey of any depth."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Shaped
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from eqvae.images.bands import UPRIGHT, Bands, Decoded, Pixels, describe, to_planes, to_range, wrong_channels

_PIXELS_AT_A_TIME = 2**22

_UNSIGNED = 1
"""TIFF's number for it."""

SIDEWAYS = frozenset(UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
"""What makes a width of a height."""


def to_channels(image: Image.Image, pixels: Pixels) -> Decoded:
    """Make of a loaded picture the channels that are asked for."""
    upright, wanted = _to_upright(image), pixels.channels
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(upright, pixels, _num_bits(image), is_narrow=_is_narrow(image))
    if wanted in (1, 3):
        is_grey = image.mode in ("1", "L", "LA")
        if wanted == 1 and image.mode == "L" and not image.has_transparency_data:
            return Decoded(Bands([upright.copy()]), describe(1, 1, "8 bits"))
        rgb = _to_rgb(upright)
        if wanted == 3:
            return Decoded(rgb, describe(1, 3, "8 bits") if is_grey else "")
        return Decoded(Bands([rgb.convert("L")]), describe(1 if is_grey else 3, 1, "8 bits"))
    if image.mode == "P":
        upright = upright.convert("RGBA" if image.has_transparency_data else "RGB")
    planes = upright.split()
    if len(planes) != wanted:
        raise wrong_channels(len(planes), wanted)
    return Decoded(Bands(planes), describe(wanted, wanted, "8 bits"))


def _deep_grey(image: Image.Image, pixels: Pixels, num_bits: int, *, is_narrow: bool) -> Decoded:
    """Scale grey of more than 8 bits; `convert` would clip. Where colours are asked for, it is rounded to 8 bits."""
    if pixels.channels != 3:
        return to_planes(_values(image, is_narrow)[..., None], pixels, num_bits=num_bits)
    converted, done = Image.new("RGB", image.size), ""
    largest = max(float(np.asarray(rows).max()) for _, rows in _some_rows(image))
    for top, rows in _some_rows(image):
        scaled, found = to_range(_values(rows, is_narrow), pixels.range, num_bits=num_bits, largest=largest)
        converted.paste(Image.fromarray((scaled + 0.5).astype(np.uint8)).convert("RGB"), (0, top))
        done = describe(1, 3, found)
    return Decoded(converted, done)


def _values(image: Image.Image, is_narrow: bool) -> Shaped[np.ndarray, "h w"]:
    """Take grey values; those of 16 bits, which Pillow can hold in 32, in the type whose range they have."""
    values = np.asarray(image)
    return values.astype(np.uint16) if is_narrow and values.dtype == np.int32 else values


def _tag(image: Image.Image, name: ExifTags.Base, default: int) -> int:
    """Look up what a TIFF says of its grey values; other formats don't."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    return int(tags.get(name, (default,))[0])


def _num_bits(image: Image.Image) -> int:
    """Look up how many bits of a grey value count: no format but TIFF has more than 16."""
    return _tag(image, ExifTags.Base.BitsPerSample, 16)


def _is_narrow(image: Image.Image) -> bool:
    """Whether grey values are without a sign and of 16 bits at most, however many Pillow holds them in."""
    return _num_bits(image) <= 16 and _tag(image, ExifTags.Base.SampleFormat, _UNSIGNED) == _UNSIGNED


def is_cut_to_8_bits(image: Image.Image) -> bool:
    """Whether Pillow reads colours of 16 bits, and gives 8 of them."""
    tiles = image.tile if isinstance(image, ImageFile) else []
    return image.mode in ("RGB", "RGBA") and any(";16" in str(tile.args) for tile in tiles)


def upright_turn(image: Image.Image) -> Image.Transpose | None:
    """Look up what undoes the EXIF orientation; PIL has already done so for a decoded TIFF, and removed the tag."""
    try:
        return UPRIGHT.get(int(image.getexif().get(ExifTags.Base.Orientation) or 1))
    except Exception:  # damaged metadata around sound pixels
        return None


def _to_upright(image: Image.Image) -> Image.Image:
    turn = upright_turn(image)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of 8 bits to RGB, some rows at a time: the whole is never there three times."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()  # the opened one keeps its decoder's buffers
    converted = Image.new("RGB", image.size)
    for top, rows in _some_rows(image):
        converted.paste(_rows_to_rgb(rows), (0, top))
    return converted


def _some_rows(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Cut a picture into parts of some rows, each with its first row's number."""
    num_rows = max(1, _PIXELS_AT_A_TIME // image.width)
    for top in range(0, image.height, num_rows):
        yield top, image.crop((0, top, image.width, min(top + num_rows, image.height)))


def _rows_to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
