"""Damaged pictures, archives, tables and folders: the right images, or one line, and nothing else happens.

150 of them with every run of the tests; more than 10,000 with `make faults`.
"""

import faulthandler
import functools
import io
import os
import random
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from eqvae.cli import run
from eqvae.errors import UserError
from eqvae.images import BrokenImageError, ImageSource, adm_crop, decode_image, open_images, tables  # noqa: F401 (before forks)

sys.path.append(str(Path(__file__).parent))
from fenced import MAX_SEC, in_fence

SIDE_PX = 24
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 4), dtype=np.uint8)
    noise[8:, :, :] //= 64  # something to compress
    image, buffer = Image.fromarray(noise).convert("RGB" if mode == "CMYK" else mode.split(";")[0]), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    image.convert(mode).save(buffer, kind, **options) if mode == "CMYK" else image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_with_metadata() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 300, zip=True)
    info.add_itxt("c", "d" * 300, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("PNG", pnginfo=info, icc_profile=b"p" * 200, exif=exif)


@functools.cache
def pictures() -> list[bytes]:
    """One of each format and mode."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 8, "words"
    more = [Image.new("RGB", (SIDE_PX, SIDE_PX), "red")]
    return [
        png_with_metadata(), encoded("PNG", "RGBA"), encoded("PNG", "P"), encoded("PNG", "1"), encoded("PNG", "I;16"),
        encoded("PNG", save_all=True, append_images=more), encoded("JPEG", exif=exif, icc_profile=b"p" * 200),
        encoded("JPEG", progressive=True), encoded("JPEG", "CMYK"), encoded("JPEG", "L"),
        encoded("MPO", save_all=True, append_images=more), encoded("WEBP"), encoded("WEBP", "RGBA", lossless=True),
        encoded("WEBP", save_all=True, append_images=more), encoded("GIF", "P", save_all=True, append_images=more),
        encoded("BMP"), encoded("BMP", "P"), encoded("PPM"), encoded("PPM", "L"), encoded("PPM", "1"),
        b"P3 2 2 255 " + b"9 " * 12, encoded("TIFF", compression="tiff_lzw"), encoded("TIFF", compression="jpeg"),
        encoded("TIFF", "I;16"), encoded("TIFF", "CMYK", compression="tiff_adobe_deflate"),
        encoded("TIFF", "1", compression="group4"), encoded("JPEG2000"), encoded("AVIF"), encoded("AVIF", "RGBA"),
    ]  # fmt: skip


@functools.cache
def archives() -> list[bytes]:
    """Archives of each flavour."""
    found = []
    for flavour in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=flavour) as archive:
            long = "long" * 20 + "ä" if flavour != tarfile.USTAR_FORMAT else "short"
            for name, content in (
                ("0.png", pictures()[1]),
                ("0.mask.png", pictures()[3]),
                ("0.cls", b"3"),
                (f"{long}/1.jpg", pictures()[6]),
                (f"{long}/1.cls", b"cat"),
                ("2.txt", b"x"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        found.append(buffer.getvalue())
    return found


@functools.cache
def table_files() -> list[bytes]:
    """Tables of each compression, plain and in structs, of several row groups."""
    cells = [{"bytes": picture, "path": None} for picture in pictures()[:6]]
    labels: list[list[Any]] = [list(range(6)), ["a", "b"] * 3, [1.0] * 6]
    found = []
    for compression, label in zip(("snappy", "zstd", "none"), labels, strict=True):
        buffer = io.BytesIO()
        table = pa.table({"image": cells, "raw": pictures()[6:12], "label": label})
        pq.write_table(table, buffer, compression=compression, row_group_size=4)
        found.append(buffer.getvalue())
    return found


@st.composite
def damaged(draw: st.DrawFn, bases: Callable[[], list[bytes]]) -> bytes:
    """A sound file with some bytes changed, moved, left out or put in; the first ones more often than the rest."""
    content = bytearray(draw(st.sampled_from(bases())))
    chance = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, 8))):
        size = max(len(content), 1)
        place = chance.randrange(size) if chance.random() < 0.5 else min(chance.randrange(200), size - 1)
        length = chance.choice((1, 1, 2, 4, 8, 30))
        kind = chance.randrange(7)
        if kind == 0 and content:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place : place + length] = bytes(chance.choice(EXTREMES) for _ in range(length))
        elif kind == 2:
            content[place : place + length] = chance.randbytes(length)
        elif kind == 3:
            del content[place : place + length]
        elif kind == 4:
            content[place:place] = content[chance.randrange(size) :][:length]
        elif kind == 5:
            content[place : place + length] = str(chance.randrange(10**length)).encode()[:length]
        elif chance.random() < 0.3:
            del content[place:]
    return bytes(content)


def read_picture(content: bytes) -> None:
    """It decodes, or it is broken for a reason of one line."""
    try:
        image = decode_image(content, "it")
    except BrokenImageError as error:
        assert "\n" not in str(error)
        assert error.image.reason
    else:
        assert image.mode == "RGB"
        assert adm_crop(image, 16).shape == (16, 16, 3)


def read_source(open_it: Callable[[], ImageSource]) -> None:
    """It opens or is refused in one line; its images are read or broken."""
    try:
        source = open_it()
        line = source.describe().encode()
        assert b"\n" not in line
        source.fingerprint()
        for index in range(min(len(source), 8)):
            source.label(index).encode()
            try:
                assert source.read(index).mode == "RGB"
            except BrokenImageError as error:
                assert "\n" not in str(error)
        if source.class_names is not None:
            assert 0 <= source.class_of(0) < len(source.class_names)
    except UserError as error:
        assert "\n" not in str(error)


def try_all(kind: str, num_inputs: int, folder: Path) -> None:
    """Read so many damaged inputs of one kind in a fenced child."""
    bases = {"pictures": pictures, "archives": archives, "tables": table_files}[kind]
    bases()
    path = folder / {"archives": "data.tar", "tables": "data.parquet"}.get(kind, "data.png")

    def work(begin: Callable[[bytes], None]) -> None:
        @settings(max_examples=num_inputs, derandomize=True, database=None, deadline=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(damaged(bases))
        def each(content: bytes) -> None:
            begin(content)
            if kind == "pictures":
                read_picture(content)
                return
            path.write_bytes(content)
            read_source(lambda: open_images(str(path)))

        each()

    in_fence(work, folder)


SHORT = (("pictures", 80), ("archives", 40), ("tables", 30))
LONG = (("pictures", 6000), ("archives", 2500), ("tables", 2000))


@pytest.mark.parametrize(("kind", "num_inputs"), SHORT)
def test_some_damaged(kind: str, num_inputs: int, tmp_path: Path) -> None:
    try_all(kind, num_inputs, tmp_path / "fenced")


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "num_inputs"), LONG)
def test_many_damaged(kind: str, num_inputs: int, tmp_path: Path, counts: dict[str, Any]) -> None:
    try_all(kind, num_inputs, tmp_path / "fenced")
    counts["damaged"] = {kind: {"inputs": num_inputs}}


def test_the_fence_is_closed(tmp_path: Path) -> None:
    """What the other tests rely on: each of these ends the child."""
    outside = tmp_path / "outside"
    for crime in (
        lambda: outside.write_text("x"),
        lambda: os.system("true"),
        lambda: bytes(3 * 2**29),
        lambda: (faulthandler.disable(), os.abort()),  # without a trace
    ):
        with pytest.raises(AssertionError, match="the child ended with"):
            in_fence(lambda begin, crime=crime: (begin(b""), crime()), tmp_path / "fenced")
    assert not outside.exists()


@settings(max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: not {0, 47} & set(name)), max_size=6,
                      unique=True), depth=st.integers(0, 2))  # fmt: skip
def test_names_of_any_bytes(names: list[bytes], depth: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    top = tmp_path_factory.mktemp("names")
    members = io.BytesIO()
    with tarfile.open(fileobj=members, mode="w") as archive:
        for number, name in enumerate(names):
            if name in (b".", b".."):
                continue
            path = top.joinpath(*(os.fsdecode(part) for part in (*names[:depth][:number], b"d", name)))
            if not path.exists() and not any(folder.is_file() for folder in path.parents):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(pictures()[1])
            info = tarfile.TarInfo(f"{os.fsdecode(name)}/{os.fsdecode(name)}.png")
            info.size = len(pictures()[1])
            archive.addfile(info, io.BytesIO(pictures()[1]))
    read_source(lambda: open_images(str(top)))
    (top / "x.tar").write_bytes(members.getvalue())
    read_source(lambda: open_images(str(top / "x.tar")))


# ---- what got through once


def large(kind: str, mode: str, side: int = 13_000, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, kind, **options)
    return buffer.getvalue()


def test_bombs(tmp_path: Path) -> None:
    """Small files whose headers promise 169 megapixels."""
    side = 13_000
    header = struct.pack(">4sII", b"IHDR", side, side) + encoded("PNG", "P")[24:29]
    png = encoded("PNG", "P")
    bombs = [
        png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:],
        encoded("GIF", "P")[:6] + struct.pack("<HH", side, side) + encoded("GIF", "P")[10:],
        encoded("BMP")[:18] + struct.pack("<ii", side, side) + encoded("BMP")[26:],
        b"P5 13000 13000 255 " + bytes(100),
    ]

    def work(begin: Callable[[bytes], None]) -> None:
        for content in bombs:
            begin(content)
            with pytest.raises(BrokenImageError, match="13,000 x 13,000 px are 169 megapixels, and a"):
                decode_image(content, "it")

    in_fence(work, tmp_path / "fenced")


@pytest.mark.faults
def test_the_largest_that_are_decoded_stay_below_the_limit(tmp_path: Path, counts: dict[str, Any]) -> None:
    """Of each format, just below its limit, in the mode that takes most."""
    kinds = (("PNG", "RGBA", 9400), ("PNG", "LA", 9400), ("JPEG", "RGB", 9400), ("JPEG", "CMYK", 9400),
             ("TIFF", "RGBA", 8100), ("WEBP", "RGBA", 6600), ("GIF", "P", 9400), ("BMP", "RGB", 9400))  # fmt: skip
    for kind, mode, side in kinds:
        options = {"progressive": True, "subsampling": 0} if kind == "JPEG" else {}
        content = large(kind, mode, side, **options)

        def work(begin: Callable[[bytes], None], content: bytes = content, side: int = side) -> None:
            begin(content)
            assert decode_image(content, "it").size == (side, side)

        in_fence(work, tmp_path / "fenced", max_sec=10 * MAX_SEC)
    counts["largest"] = {"pictures": {"inputs": len(kinds)}}


def shared_hostile() -> list[Path]:
    folder = Path(__file__).resolve().parents[3] / "shared" / "cases" / "hostile"
    return sorted(path for path in folder.glob("*") if path.name.startswith(("images-", "tar-")))


@pytest.mark.skipif(not shared_hostile(), reason="needs ../shared/cases")
def test_files_that_got_through(tmp_path: Path) -> None:
    def work(begin: Callable[[bytes], None]) -> None:
        for path in shared_hostile():
            begin(path.read_bytes())
            read_source(lambda path=path: open_images(str(path)))

    in_fence(work, tmp_path / "fenced")


@pytest.mark.skipif(not shared_hostile(), reason="needs ../shared/cases")
@pytest.mark.faults
def test_files_that_got_through_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counts: dict[str, Any]
) -> None:
    for number, path in enumerate(shared_hostile()):
        out = tmp_path / str(number)
        line = ["encode", "untrained:tiny-kl", "--data", str(path), "--out", str(out), "--image-size", "32"]
        code = run([*line, "--device", "cpu", "--num-workers", "0"])
        error = [each for each in capsys.readouterr().err.splitlines() if "warning" not in each.lower()]
        assert (code, "Traceback" in "".join(error)) in ((0, False), (2, False)), (path.name, error)
        assert code == 0 or path.name in error[-1], (path.name, error)
    counts["hostile"] = {"command line": {"inputs": len(shared_hostile())}}
