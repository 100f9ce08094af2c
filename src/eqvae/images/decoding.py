"""Encoded images to 8-bit RGB or to planes (`bands.py`), to crops, to what a network sees.

Raster formats alone are decoded, in every mode that Pillow reads, upright, transparency on white, and arrays
(`arrays.py`); what the metadata hold does not matter, and memory is bounded. Two crops are usual:
for evaluation and latents ADM's centre crop (openai/guided-diffusion, `center_crop_arr`), as DiT, SiT and REPA use it;
for training the random crop of latent diffusion (CompVis/latent-diffusion, `ImageNetSR`).
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from eqvae.errors import printable
from eqvae.images.arrays import decode_array, decode_tiff, is_array, is_tiff
from eqvae.images.bands import RGB, Crop, Decoded, Picture, Pixels, UnfitImageError
from eqvae.images.modes import SIDEWAYS, is_cut_to_8_bits, to_channels, upright_turn

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
"""File names that count as images, in lower case."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may recognize, whatever a file is called: for PostScript it would start Ghostscript."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"

_MAGIC = (
    _PNG, _JPEG, b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF", b"Py", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51",
)  # fmt: skip
"""First bytes of those formats; AVIF has `ftyp` after four others."""

_NUM_HEAD_BYTES = 32

MAX_DECODING_BYTES = 2**30
"""What decoding one picture may take at its peak: 89 megapixels of a PNG or JPEG."""

_BYTES_PER_PIXEL = {"TIFF": 16, "AVIF": 20, "WEBP": 24, "JPEG2000": 32}
"""What decoding takes at its peak, measured with Pillow 12."""

_USUAL_BYTES_PER_PIXEL = 12

MAX_SIDE_PX = 1_000_000
"""Pillow keeps a pointer for each row."""

MAX_ENCODED_BYTES = 2**29
"""Larger files are no pictures that anybody trains on."""

_MAX_EXIF_BYTES = 2**16

_MAX_ELONGATION = 16
"""Where a side is more than this many times the crop's, the crop is made without the rest."""

MIN_CROP_FRACTION = 0.5
"""Smallest side of a training crop, as a fraction of the image's short side; the largest is the short side itself."""


class BrokenImage(NamedTuple):
    """An image that cannot be decoded, on record."""

    name: str

    reason: str

    def __str__(self) -> str:
        """Name it and say why."""
        return f"'{self.name}' ({self.reason})"


class BrokenImageError(Exception):
    """An image that cannot be decoded; the line names it and says why."""

    def __init__(self, name: str, reason: str, mend: str = "") -> None:
        """Keep both apart, too: a journal has a field for each. A mend is there where all such images are unfit."""
        self.mend = mend
        self.image = BrokenImage(printable(name), printable(reason))
        super().__init__(f"'{self.image.name}' cannot be decoded: {self.image.reason}")


def open_picture(content: bytes | Path) -> Image.Image:
    """Open a picture by its header, not yet decoded; every picture that this package reads goes through here."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # Pillow before 11.3 has no AVIF
    if isinstance(content, Path):
        _check_file(content)
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats)


def decode_image(content: bytes | Path, name: str, pixels: Pixels = RGB) -> Picture:
    """Decode one image, to 8-bit RGB or to the channels that are asked for, upright, in at most 1 GiB."""
    return decode_and_tell(content, name, pixels).picture


def decode_and_tell(content: bytes | Path, name: str, pixels: Pixels) -> Decoded:
    """Decode one image, and say what was done to it."""
    # A decoder fed with damaged bytes raises almost anything (OSError, SyntaxError, struct.error, zlib.error, ...),
    # and PIL warns about damaged metadata and large images: neither may end a run.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _decode(content, pixels)
        except UnfitImageError as error:
            raise BrokenImageError(name, str(error), error.mend) from None
        except Exception as error:
            reason = _reason(error, content)
            bare = None if isinstance(error, _TooLargeError) else without_metadata(content)
        try:
            if bare is not None:
                return _decode(bare, pixels)
        except Exception as error:
            reason = _reason(error, content)
    raise BrokenImageError(name, reason)


class _TooLargeError(ValueError):
    """A picture beyond what may be decoded."""


def _decode(content: bytes | Path, pixels: Pixels) -> Decoded:
    head = _head(content)
    if is_array(head):
        return decode_array(content, pixels)
    if is_tiff(head) and pixels.channels not in (1, 3):  # Pillow reads four samples as three
        return decode_tiff(content, pixels)
    try:
        with open_picture(content) as image:
            if not (pixels.range.is_stated and is_cut_to_8_bits(image)):
                check_pixels(image)
                image.load()
                return to_channels(image, pixels)
    except UnidentifiedImageError:
        if not is_tiff(head):
            raise
    if not is_tiff(head):
        raise ValueError("its colours of 16 bits are read in 8: write a TIFF for --white and --black")
    return decode_tiff(content, pixels)


def check_pixels(image: Image.Image) -> None:
    """Refuse a picture by its header where decoding it would take more than 1 GiB."""
    limit = MAX_DECODING_BYTES // _BYTES_PER_PIXEL.get(image.format or "", _USUAL_BYTES_PER_PIXEL)
    width, height = image.size
    if width * height > limit:
        what = f"{width * height / 1e6:,.0f} megapixels, and a {image.format} picture may have {limit / 1e6:.0f}"
        raise _TooLargeError(f"{width:,} x {height:,} px are {what}")
    if max(width, height) > MAX_SIDE_PX:
        raise _TooLargeError(f"{width:,} x {height:,} px: a side may have {MAX_SIDE_PX:,}")


def _reason(error: Exception, content: bytes | Path) -> str:
    """Say why in words that are the same each time; PIL names the address of its buffer."""
    if not isinstance(error, UnidentifiedImageError):
        return str(error) or type(error).__name__
    head = _head(content)
    if not head:
        return "it is empty"
    if head.startswith(_MAGIC):
        return "its header is damaged"
    return f"it is no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} (it begins with {head[:12]!r})"


def _check_file(path: Path) -> None:
    """Refuse what is no file: opening a pipe would wait for its writer."""
    if not path.is_file():
        raise FileNotFoundError("it is no file" if path.exists() else "there is no such file")


def _head(content: bytes | Path) -> bytes:
    """Read the bytes that tell a format."""
    if isinstance(content, bytes):
        return content[:_NUM_HEAD_BYTES]
    _check_file(content)
    with content.open("rb") as file:
        return file.read(_NUM_HEAD_BYTES)


def is_image(content: bytes | Path) -> bool:
    """Tell from the header alone whether this is a picture of a format that we read."""
    try:
        if isinstance(content, Path) and not may_be_image(_head(content)):
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_picture(content):
                return True
    except Image.DecompressionBombError:  # a picture all the same, to be refused as one
        return True
    except Exception:
        bare = without_metadata(content)
        return bare is not None and is_image(bare)


def may_be_image(head: bytes) -> bool:
    """Tell by the first bytes whether it is worth a closer look."""
    return head.startswith(_MAGIC) or head[4:8] == b"ftyp"


def without_metadata(content: bytes | Path) -> bytes | None:
    """Leave out a PNG's or a JPEG's texts, profiles and thumbnails, over which Pillow can stumble before the pixels.

    The orientation stays. None where there is nothing to leave out.
    """
    if isinstance(content, Path):
        try:
            if not _head(content).startswith((_PNG, _JPEG)) or content.stat().st_size > MAX_ENCODED_BYTES:
                return None
            content = content.read_bytes()
        except OSError:
            return None
    parts = _png_parts(content) if content.startswith(_PNG) else _jpeg_parts(content)
    bare = b"".join(parts)
    return bare if bare and len(bare) < len(content) else None


def _png_parts(content: bytes) -> Iterator[bytes]:
    """List the signature and the chunks that make pixels."""
    yield content[: len(_PNG)]
    place = len(_PNG)
    while place + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        chunk = content[place : place + 12 + length]
        is_sound = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == struct.unpack(">I", chunk[-4:])[0]
        # A critical chunk's name begins with a capital letter.
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and is_sound and length <= _MAX_EXIF_BYTES):
            yield chunk
        place += 12 + length


def _jpeg_parts(content: bytes) -> Iterator[bytes]:
    """List the segments of the first picture, without applications' own; those of JFIF, EXIF and Adobe stay."""
    if not content.startswith(_JPEG):
        return
    yield content[:2]
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xDA:  # pixels follow, up to the end
            break
        length = 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if not (0xE2 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            yield content[place : place + length]
        place += length
    yield content[place:]


def read_size(content: bytes | Path) -> tuple[int, int]:
    """Read an upright picture's width and height in px from its header; where that is damaged, anything is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_picture(content) as image:
            check_pixels(image)
            # PIL turns a TIFF when it is decoded, and tells the turned size before that.
            is_turned = image.format != "TIFF" and upright_turn(image) in SIDEWAYS
            return image.size[::-1] if is_turned else image.size


def adm_crop(image: Picture, size: int | tuple[int, int]) -> Crop:
    """Resize an image to cover a size (height, width; or the side of a square) and cut its centre out.

    Halving with a box filter as long as the image is at least twice too large, then one bicubic resize: the bicubic
    filter then never shrinks by more than two.
    """
    height, width = (size, size) if isinstance(size, int) else size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    resized = round(image.width * scale), round(image.height * scale)
    if resized[0] > _MAX_ELONGATION * width or resized[1] > _MAX_ELONGATION * height:
        return _elongated_crop(image, resized, (width, height))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def _elongated_crop(image: Picture, resized: tuple[int, int], cropped: tuple[int, int]) -> Crop:
    """Make the centre of a resized image alone: the whole of a thin image, enlarged, can take gigabytes."""
    box: list[float] = []
    for length, length_after, length_cropped in zip(image.size, resized, cropped, strict=True):
        first = (length_after - length_cropped) // 2
        box.append(first * length / length_after)
        box.append(min((first + length_cropped) * length / length_after, length))
    left, right, top, bottom = box
    return np.array(image.resize(cropped, Image.Resampling.BICUBIC, box=(left, top, right, bottom)))


def ldm_random_crop(image: Picture, size: int | tuple[int, int], random: np.random.Generator, *, flip: bool) -> Crop:
    """Cut a random part out and resize it by area to a size (height, width; or the side of a square).

    The part has the size's aspect, and sides of 0.5 ... 1 times those of the largest such part, uniformly.
    """
    height, width = (size, size) if isinstance(size, int) else size
    # Of a square both are the image's short side, exactly.
    is_high = image.width * height <= image.height * width
    longest = (image.width, image.width * height / width) if is_high else (image.height * width / height, image.height)
    share = random.uniform(MIN_CROP_FRACTION, 1.0)
    cut_width, cut_height = (max(1, int(side * share)) for side in longest)
    left = int(random.integers(image.width - cut_width + 1))
    top = int(random.integers(image.height - cut_height + 1))
    mirrored = random.random() < 0.5
    # What OpenCV's INTER_AREA does: the mean over the area when shrinking, bilinear when enlarging.
    is_shrunk = cut_width >= width and cut_height >= height
    resample = Image.Resampling.BOX if is_shrunk else Image.Resampling.BILINEAR
    # Cropped before, not with `resize(box=...)`: that filter would see the pixels around the box.
    crop = image.crop((left, top, left + cut_width, top + cut_height)).resize((width, height), resample)
    return np.array(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirrored else crop)


def to_images(crops: Sequence[Crop] | Shaped[np.ndarray, "n h w k"]) -> Float[Tensor, "n k h w"]:
    """Turn crops of one size, 0 ... 255, into images in [-1, 1]."""
    stacked = torch.from_numpy(np.asarray(crops)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1.0).contiguous()
