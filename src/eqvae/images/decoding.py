"""Encoded images to 8-bit RGB: raster formats alone, every mode that Pillow reads, upright, transparency on white."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
"""File names that count as images, in lower case."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may recognize, whatever a file is called: for PostScript it would start Ghostscript."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the transposition that undoes it."""


class BrokenImageError(Exception):
    """An image that cannot be decoded; the line names it and says why."""


def open_picture(content: bytes | Path) -> Image.Image:
    """Open a picture by its header, not yet decoded; every picture that this package reads goes through here."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # Pillow before 11.3 has no AVIF
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats)


def decode_image(content: bytes | Path, name: str) -> Image.Image:
    """Decode one image to 8-bit RGB, upright."""
    # A decoder fed with damaged bytes raises almost anything (OSError, SyntaxError, struct.error, zlib.error, ...),
    # and PIL warns about damaged metadata and large images: neither may end a run.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_picture(content) as image:
                image.load()
                return _to_rgb(_to_upright(image))
    except Exception as error:
        raise BrokenImageError(f"'{name}' cannot be decoded: {str(error) or type(error).__name__}") from None


def is_image(content: bytes | Path) -> bool:
    """Tell from the header alone whether this is a picture of a format that we read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_picture(content):
                return True
    except Exception:
        return False


def _to_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; PIL has already done so for TIFF, and removed the tag."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata around sound pixels
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 0 ... 65535 to 0 ... 255; `convert` would clip."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"grey values {grey.min()} ... {grey.max()} are outside 16 bits")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
