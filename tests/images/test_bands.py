"""Pictures of any number of channels and any depth: what was written is read, and what is done to it is said."""

import io
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from eqvae.errors import UserError
from eqvae.images import (
    Bands,
    BrokenImageError,
    Pixels,
    RangeConfig,
    adm_crop,
    decode_image,
    encoding_batches,
    ldm_random_crop,
    open_images,
    training_batches,
)
from eqvae.images.decoding import decode_and_tell

GREY, FIVE = Pixels(channels=1), Pixels(channels=5)
TWELVE_BITS = RangeConfig(white=4095.0)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, photometric="minisblack", **options)
    return buffer.getvalue()


def tiff_of_12_bits(values: np.ndarray) -> bytes:
    """Pack two values of 12 bits into three bytes, as cameras do."""
    left, right = values.ravel().astype(np.uint32).reshape(-1, 2).T
    data = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 277: 1, 278: height, 273: 0, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def random_bands(dtype: type = np.uint16, largest: int = 4096, shape: tuple[int, ...] = (12, 10, 5)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, largest, shape).astype(dtype)


def read(content: bytes, pixels: Pixels) -> np.ndarray:
    return np.asarray(decode_image(content, "test", pixels))


@pytest.mark.parametrize("planar", ["contig", "separate", "pages", "zlib"])
def test_a_tiff_of_five_bands(planar: str) -> None:
    bands = random_bands()
    planes = np.moveaxis(bands, 2, 0)
    content = {
        "contig": lambda: tiff(bands, planarconfig="contig"),
        "separate": lambda: tiff(planes, planarconfig="separate"),
        "pages": lambda: tiff(planes),
        "zlib": lambda: tiff(bands, planarconfig="contig", compression="zlib"),
    }[planar]()
    found = read(content, Pixels(channels=5, range=TWELVE_BITS))
    assert found.dtype == np.float32
    assert np.allclose(found, bands * (255 / 4095.0), atol=1e-4)


@pytest.mark.parametrize("order", ["HWC", "CHW", "npz"])
def test_arrays(order: str) -> None:
    bands = random_bands(np.uint8, 256)
    content = npz(arr_0=bands) if order == "npz" else npy(bands if order == "HWC" else np.moveaxis(bands, 2, 0))
    assert np.array_equal(read(content, FIVE), bands)


def test_arrays_in_fortran_s_order_and_of_big_ends() -> None:
    bands = random_bands()
    for array in (np.asfortranarray(bands), bands.astype(">u2")):
        assert np.allclose(read(npy(array), FIVE), bands / 257.0, atol=1e-4)


def test_each_depth_has_its_own_white() -> None:
    values = np.array([[0, 1000, 4095, 2048]], np.uint16)
    for pixels in (GREY, Pixels()):
        twelve = decode_and_tell(tiff_of_12_bits(values), "12", pixels)
        assert "12 bits, 0 is black and 4,095 white" in twelve.done
        assert np.abs(np.asarray(twelve.picture)[..., 0] - values * (255 / 4095.0)).max() <= 0.5
        sixteen = decode_and_tell(encoded(Image.fromarray(values)), "16", pixels)
        assert "65,535 white (its largest is 4,095: --white sets another)" in sixteen.done
    stated = decode_and_tell(encoded(Image.fromarray(values)), "16", Pixels(channels=1, range=TWELVE_BITS))
    assert "--white" not in stated.done
    assert np.allclose(np.asarray(stated.picture)[..., 0], values * (255 / 4095.0), atol=1e-4)


def test_numbers_without_a_range_need_one_and_are_clipped_to_it() -> None:
    values = np.array([[-1.0, 0.0, 3.0]], np.float32)
    with pytest.raises(BrokenImageError, match="its float32 numbers have no fixed range") as raised:
        read(npy(values), GREY)
    assert "--white 1" in raised.value.mend
    found = read(npy(values), Pixels(channels=1, range=RangeConfig(white=1.0, black=-1.0)))
    assert found.ravel().tolist() == [0.0, 127.5, 255.0]
    for kind in ("F", "I"):
        deep = Image.fromarray(np.array([[0, 70_000]], np.float32 if kind == "F" else np.int32))
        with pytest.raises(BrokenImageError, match="no fixed range"):
            decode_image(encoded(deep, "TIFF"), "deep", GREY)
        whole = Pixels(channels=3, range=RangeConfig(white=70_000.0))
        assert np.asarray(decode_image(encoded(deep, "TIFF"), "deep", whole))[0, 1].tolist() == [255] * 3


@pytest.mark.parametrize("kind", [np.int32, np.int16])
def test_a_range_is_not_guessed_from_the_pixels(kind: type) -> None:
    deep = tiff(np.array([[0, 30_000]], kind))  # they would fit 16 bits without a sign
    for pixels in (GREY, Pixels()):
        with pytest.raises(BrokenImageError, match="no fixed range"):
            decode_image(deep, "deep", pixels)
    stated = decode_image(deep, "deep", Pixels(channels=1, range=RangeConfig(white=30_000.0)))
    assert np.asarray(stated).ravel().tolist() == [0.0, 255.0]


@pytest.mark.parametrize(("white", "black"), [(0.0, None), (1.0, 2.0), (float("nan"), None), (float("inf"), None)])
def test_a_range_has_an_inside(white: float, black: float | None) -> None:
    with pytest.raises(UserError, match="--white"):
        RangeConfig(white=white, black=black)


def test_grey_is_grey_and_colours_become_luma() -> None:
    grey = Image.fromarray(random_bands(np.uint8, 256, (8, 8)))
    assert np.array_equal(read(encoded(grey), GREY)[..., 0], np.asarray(grey))
    red = decode_and_tell(encoded(Image.new("RGB", (2, 2), (255, 0, 0))), "red", GREY)
    assert (np.asarray(red.picture) == 76).all()
    assert "made grey by luma" in red.done
    see_through = Image.new("LA", (1, 1), (0, 0))
    assert read(encoded(see_through), GREY).tolist() == [[[255]]]


def test_four_channels_are_taken_as_they_are() -> None:
    image = Image.fromarray(random_bands(np.uint8, 256, (4, 6, 4)), "RGBA")
    assert np.array_equal(read(encoded(image), Pixels(channels=4)), np.asarray(image))


@pytest.mark.parametrize(
    ("content", "has"),
    [(encoded(Image.new("RGB", (4, 4))), 3), (encoded(Image.new("L", (4, 4))), 1), (npy(np.zeros((4, 4, 6))), 6),
     (tiff(np.zeros((6, 4, 4), np.uint8)), 6), (tiff(np.zeros((4, 4), np.uint8)), 1)],
    ids=range(5),
)  # fmt: skip
def test_other_channels_are_refused(content: bytes, has: int) -> None:
    with pytest.raises(BrokenImageError, match=f"has {has} channels?, and the autoencoder takes 5") as raised:
        read(content, FIVE)
    assert f"--channels {has}" in raised.value.mend


def _bomb() -> bytes:
    """A page of 8 x 8 x 5 bytes whose strip unpacks to 64 MB."""
    content = bytearray(tiff(np.zeros((8, 8, 5), np.uint8), planarconfig="contig", compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        offset = file.pages[0].tags["StripByteCounts"].valueoffset
        place = file.pages[0].tags["StripOffsets"].valueoffset
    strip = zlib.compress(bytes(2**26), 9)
    struct.pack_into("<I", content, place, len(content))
    for tag, value in ((place, len(content)), (offset, len(strip))):
        struct.pack_into("<I", content, tag, value)
    return bytes(content) + strip


HUGE = npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(65536, 65536)")[:128] + b"\0"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(npy(np.array([{}], object)), "object"), (npy(np.zeros((2, 4, 4, 5))), r"shape is \(2, 4, 4, 5\)"),
     (npy(np.zeros((0, 4, 5), np.uint8)), "empty"), (npy(np.zeros((4, 4, 5), np.uint8))[:-1], "other than 80 bytes"),
     (npy(np.full((4, 4, 5), np.nan, np.float32)), "NaN"), (npz(a=np.zeros(3), b=np.zeros(3)), "holds 2 arrays"),
     (npz(a=np.zeros((4000, 4000, 5), np.uint8)), "unpacks from"), (HUGE, "other than"), (npy(np.zeros(3))[:20], "."),
     (npz(arr_0=np.zeros((4, 4, 5)))[:60], "."), (_bomb(), "unpacks to more"), (tiff(np.zeros((4, 4, 5)))[:60], "."),
     (tiff(np.zeros((4, 4, 5), np.uint8), planarconfig="contig", compression="lzma"), "LZMA, is not read")],
    ids=range(13),
)  # fmt: skip
def test_what_can_not_be_read_is_one_line(content: bytes, reason: str) -> None:
    stated = Pixels(channels=5, range=RangeConfig(white=1.0))
    with pytest.raises(BrokenImageError, match=reason) as raised:
        read(content, stated)
    assert "\n" not in str(raised.value)


def test_pages_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eqvae.images.arrays.MAX_ARRAY_BYTES", 4 * 4 * 4)
    with pytest.raises(BrokenImageError, match="5 x 4 x 4 numbers of uint8 take"):
        read(tiff(np.zeros((5, 4, 4), np.uint8)), FIVE)


def test_a_tiff_without_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BrokenImageError, match="needs the package tifffile") as raised:
        read(tiff(np.zeros((5, 4, 4), np.uint8)), FIVE)
    assert "eqvae[tiff]" in raised.value.mend


def test_no_array_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pickle.load", lambda *_: pytest.fail("unpickled"))
    with pytest.raises(BrokenImageError, match="object"):
        read(npy(np.array([[{}]], object)), GREY)


def test_crops_are_those_of_colours() -> None:
    """Planes go through what three channels go through: a photograph's red, green and blue, plane by plane."""
    picture = open_images("photos", split="evaluation").read(0).resize((120, 90))
    planes = Bands(picture.split())
    for size in (16, 32, 100):
        assert np.array_equal(adm_crop(planes, size), adm_crop(picture, size))
        crops = [ldm_random_crop(each, size, np.random.default_rng(3), flip=True) for each in (planes, picture)]
        assert np.array_equal(*crops)
    deep = Bands([plane.convert("F") for plane in picture.split()])
    assert np.abs(adm_crop(deep, 32) - adm_crop(picture, 32).astype(np.float32)).max() <= 2.0
    assert 0.0 <= adm_crop(deep, 80).min() <= adm_crop(deep, 80).max() <= 255.0


@pytest.fixture
def five_bands(tmp_path: Path) -> Path:
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", random_bands(shape=(20, 24, 5)))
    return tmp_path


def test_a_folder_of_arrays(five_bands: Path) -> None:
    source = open_images(str(five_bands)).read_as(Pixels(channels=5, range=TWELVE_BITS))
    assert source.describe() == (
        "3 images, no classes (they lie in no class folders); first image: 5 channels of 16 bits, 0 is black and 4,095 "
        "white"
    )
    (batch,) = training_batches(source, image_size_px=16, batch_size=2, seed=0, num_steps=1, num_workers=0)
    assert batch.images.shape == (2, 5, 16, 16)
    assert batch.images.abs().max() <= 1.0
    (batch,) = encoding_batches(source, image_size_px=16, parts=[[0, 1]], num_workers=0)
    expected = adm_crop(source.read(1), 16)
    assert np.allclose(batch.images[1].permute(1, 2, 0), expected / 127.5 - 1.0, atol=1e-6)


def test_arrays_beside_images_are_no_images(five_bands: Path) -> None:
    Image.new("RGB", (8, 8)).save(five_bands / "a.png")
    assert open_images(str(five_bands)).describe().startswith("1 image, no classes")


@pytest.mark.parametrize("has_image", [False, True])
def test_arrays_in_an_archive(five_bands: Path, has_image: bool) -> None:
    Image.new("RGB", (8, 8)).save(five_bands / "0.png")
    names = ["0.npy", "1.npy", "2.npy", *(["0.png"] if has_image else [])]
    with tarfile.open(five_bands / "data.tar", "w") as archive:
        for name in names:
            archive.add(five_bands / name, arcname=name)
    source = open_images(str(five_bands / "data.tar"))
    if has_image:
        assert source.describe().startswith("1 image, no classes")
        assert "3 left out (3 .npy)" in source.describe()
    else:
        assert len(source.read_as(FIVE)) == 3
        assert np.asarray(source.read_as(FIVE).read(2)).shape == (20, 24, 5)


def test_data_of_other_channels_are_refused_at_once(five_bands: Path) -> None:
    with pytest.raises(UserError, match=r"--validation-data .* it has 5 channels, and the autoencoder takes 3\. Give"):
        open_images(str(five_bands)).read_as(Pixels(), "--validation-data")


def test_one_unfit_image_among_others_stops_nothing(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert open_images(str(tmp_path)).read_as(Pixels()).describe() == (
        "2 images, no classes (they lie in no class folders)"
    )
