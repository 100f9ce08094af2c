"""Each format decodes to the exact colours that were written."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.images import BrokenImageError, decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(content: bytes) -> np.ndarray:
    image = decode_image(content, "test")
    assert image.mode == "RGB"
    return np.asarray(image)


def pixels(*colours: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (len(colours), 1))
    image.putdata([colour if len(colour) > 1 else colour[0] for colour in colours])
    return image


def test_path_and_bytes_give_the_same(tmp_path: Path) -> None:
    content = encode(pixels(RED, GREEN, BLUE))
    (tmp_path / "a.png").write_bytes(content)
    assert decode(content).tolist() == [[list(RED), list(GREEN), list(BLUE)]]
    assert np.array_equal(decode_image(tmp_path / "a.png", "a"), decode(content))


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    assert decode(encode(image)).tolist() == [[list(RED), list(BLUE)]]
    assert decode(encode(image, "GIF")).tolist() == [[list(RED), list(BLUE)]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_transparent_palette_is_white_underneath(transparency: object) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    assert decode(encode(image, transparency=transparency)).tolist() == [[list(WHITE), list(BLUE)]]


def test_grey_and_bilevel() -> None:
    assert decode(encode(pixels((0,), (77,), (255,), mode="L"))).tolist() == [[[0] * 3, [77] * 3, [255] * 3]]
    assert decode(encode(pixels((0,), (255,), mode="1"))).tolist() == [[[0] * 3, [255] * 3]]


def test_alpha_is_composited_on_white() -> None:
    colours = decode(encode(pixels((*RED, 255), (*RED, 0), (*RED, 51), mode="RGBA")))
    assert colours.tolist() == [[list(RED), list(WHITE), [255, 204, 204]]]  # 255 - 51 of white
    greys = decode(encode(pixels((0, 255), (0, 0), (0, 51), mode="LA")))
    assert greys.tolist() == [[[0] * 3, [255] * 3, [204] * 3]]


def test_key_colour_is_transparent() -> None:
    assert decode(encode(pixels(RED, BLUE), transparency=RED)).tolist() == [[list(WHITE), list(BLUE)]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 385, 386, 128 * 257, 65535]], np.uint16)
    grey = [0, 1, 1, 2, 128, 255]
    assert decode(encode(Image.fromarray(values), kind))[0, :, 0].tolist() == grey


def test_big_endian_16_bit_tiff() -> None:
    values = np.array([[0, 257, 65535]], ">u2")
    content = encode(Image.frombytes("I;16B", (3, 1), values.tobytes()), "TIFF")
    assert decode(content)[0, :, 1].tolist() == [0, 1, 255]


def test_16_bits_of_a_format_that_has_no_more() -> None:
    for kind, held in (("PPM", np.int32), ("PNG", np.uint16)):
        content = encode(Image.fromarray(np.array([[0, 257, 65535]], held)), kind)
        assert decode(content)[0, :, 2].tolist() == [0, 1, 255]


@pytest.mark.parametrize("values", [np.array([[65535]], np.int32), np.array([[0.5]], np.float32)])
def test_ranges_that_8_bits_cannot_hold_are_refused(values: np.ndarray) -> None:
    with pytest.raises(BrokenImageError, match=r"'x\.tif' cannot be decoded"):
        decode_image(encode(Image.fromarray(values), "TIFF"), "x.tif")


def test_cmyk() -> None:
    ink = pixels((0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), mode="CMYK")
    assert decode(encode(ink, "TIFF")).tolist() == [[list(WHITE), [0, 0, 0], [0, 255, 255]]]


def test_adobe_cmyk_jpeg_is_not_inverted() -> None:
    content = encode(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in content
    assert decode(content).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # a white corner, top left
    flips = {  # how a camera of that orientation stores it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    stored = Image.fromarray(np.ascontiguousarray(flips[orientation]))
    decoded = decode(encode(stored, kind, exif=exif, **options))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= 2


def test_16_bit_with_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    content = encode(Image.fromarray(np.array([[0, 65535]], np.uint16)), exif=exif)
    assert decode(content)[0, :, 0].tolist() == [255, 0]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), BLUE)]
    assert decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_truncated(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise), kind)
    with pytest.raises(BrokenImageError, match="'cut' cannot be decoded"):
        decode_image(content[: len(content) // 2], "cut")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", Path("missing.png")])
def test_no_image(content: bytes | Path) -> None:
    with pytest.raises(BrokenImageError, match="'it' cannot be decoded"):
        decode_image(content, "it")


def test_warnings_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)  # 4 x 4 warns, 8 x 8 is refused
    small, large = (encode(Image.new("RGB", (side, side), GREEN)) for side in (4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(small)[0, 0].tolist() == list(GREEN)
        with pytest.raises(BrokenImageError, match="limit"):
            decode_image(large, "large")


def test_damaged_exif_does_not_matter() -> None:
    content = encode(Image.new("L", (8, 8), 9), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff damaged")
    assert decode(content).shape == (8, 8, 3)
