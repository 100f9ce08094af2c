"""Encoded images to 8-bit RGB, to crops, to what a network sees.

Raster formats alone are decoded, in every mode that Pillow reads, upright, transparency on white. Two crops are usual:
for evaluation and latents ADM's centre crop (openai/guided-diffusion, `center_crop_arr`), as DiT, SiT and REPA use it;
for training the random crop of latent diffusion (CompVis/latent-diffusion, `ImageNetSR`).
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image
from torch import Tensor

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

MIN_CROP_FRACTION = 0.5
"""Smallest side of a training crop, as a fraction of the image's short side; the largest is the short side itself."""


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


def adm_crop(image: Image.Image, image_size_px: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the short side to `image_size_px` and cut the centre square out.

    Halving with a box filter as long as the image is at least twice too large, then one bicubic resize: the bicubic
    filter then never shrinks by more than two.
    """
    while min(image.size) >= 2 * image_size_px:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size_px / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size_px) // 2, (image.height - image_size_px) // 2
    return np.array(image.crop((left, top, left + image_size_px, top + image_size_px)))


def ldm_random_crop(
    image: Image.Image, image_size_px: int, random: np.random.Generator, *, flip: bool
) -> UInt8[np.ndarray, "size size 3"]:
    """Cut a random square out, of a side uniform in 0.5 ... 1 of the short side, and resize it by area."""
    short_side = min(image.size)
    side = max(1, int(short_side * random.uniform(MIN_CROP_FRACTION, 1.0)))
    left = int(random.integers(image.width - side + 1))
    top = int(random.integers(image.height - side + 1))
    mirrored = random.random() < 0.5
    # What OpenCV's INTER_AREA does: the mean over the area when shrinking, bilinear when enlarging.
    resample = Image.Resampling.BOX if side >= image_size_px else Image.Resampling.BILINEAR
    # Cropped before, not with `resize(box=...)`: that filter would see the pixels around the box.
    crop = image.crop((left, top, left + side, top + side)).resize((image_size_px, image_size_px), resample)
    return np.array(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirrored else crop)


def to_images(crops: Sequence[UInt8[np.ndarray, "h w 3"]] | UInt8[np.ndarray, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    """Turn 8-bit crops of one size into images in [-1, 1]."""
    stacked = torch.from_numpy(np.asarray(crops)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1.0).contiguous()
