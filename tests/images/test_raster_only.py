"""Nothing is started for a picture: Pillow would run Ghostscript, found on PATH, for PostScript under any name."""

import io
import os
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import EpsImagePlugin, Image

import eqvae
from eqvae.errors import UserError
from eqvae.images import BrokenImageError, decode_image, open_images, open_picture
from eqvae.images.decoding import is_image
from eqvae.images.image_sets import open_reference, open_samples

SIDE_PX = 32


@pytest.fixture
def eps() -> bytes:
    """What Pillow itself takes for a picture and would hand to Ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE_PX, SIDE_PX), "red").save(buffer, "EPS")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a Ghostscript of our own leaves when somebody starts it."""
    programs, trace = tmp_path / "programs", tmp_path / "started"
    programs.mkdir()
    program = programs / "gs"
    program.write_text(f"#!/bin/sh\necho started >> '{trace}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what an earlier search found
    return trace


def test_the_trap_is_real(eps: bytes, started: Path) -> None:
    with pytest.raises(Exception), Image.open(io.BytesIO(eps)) as image:  # noqa: B017 (whatever Pillow raises)
        image.load()
    assert started.exists()


def test_a_file(eps: bytes, tmp_path: Path, started: Path) -> None:
    path = tmp_path / "data" / "picture.jpg"
    path.parent.mkdir()
    path.write_bytes(eps)
    with pytest.raises(BrokenImageError, match=r"picture\.jpg' cannot be decoded"):
        open_images(str(path.parent)).read(0)
    with pytest.raises(OSError, match="cannot identify"):
        open_picture(path)
    assert not started.exists()


def test_a_member_of_a_tar_archive(eps: bytes, tmp_path: Path, started: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("picture.jpg")
        member.size = len(eps)
        tar.addfile(member, io.BytesIO(eps))
    with pytest.raises(BrokenImageError, match=r"picture\.jpg\]' cannot be decoded"):
        open_images(str(path)).read(0)
    assert not started.exists()


@pytest.mark.parametrize("is_struct", [False, True])
def test_a_cell_of_a_table(eps: bytes, tmp_path: Path, started: Path, is_struct: bool) -> None:
    path = tmp_path / "table.parquet"
    cells = [{"bytes": eps, "path": "picture.jpg"}] if is_struct else [eps]
    datasets.Dataset.from_dict({"image": cells}).to_parquet(path)
    with pytest.raises(UserError, match="has no image column"):
        open_images(str(path))
    assert not is_image(eps)
    assert not started.exists()


def test_a_declared_image_column(eps: bytes, tmp_path: Path, started: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE_PX, SIDE_PX)).save(buffer, "PNG")
    features = datasets.Features({"image": datasets.Image()})
    cells = [{"bytes": content, "path": None} for content in (buffer.getvalue(), eps)]
    path = tmp_path / "table.parquet"
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(path)
    source = open_images(str(path))
    source.read(0)
    with pytest.raises(BrokenImageError, match="cannot be decoded"):
        source.read(1)
    assert not started.exists()


def test_samples_and_their_reference(eps: bytes, tmp_path: Path, started: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "0.png").write_bytes(eps)
    with pytest.raises(UserError, match=r"0\.png' cannot be decoded"):
        open_samples(folder)
    with pytest.raises(UserError, match="1 of 1 images"):
        list(open_reference(str(folder), image_size_px=SIDE_PX).batches(range(1), batch_size=1, num_workers=0))
    assert not started.exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO"])
def test_raster_formats_stay(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE_PX, SIDE_PX), "red").save(buffer, kind)
    assert decode_image(buffer.getvalue(), "it").size == (SIDE_PX, SIDE_PX)


def test_nobody_opens_pictures_another_way() -> None:
    package = Path(eqvae.__file__).parent
    openers = [path.name for path in package.rglob("*.py") if "Image.open(" in path.read_text()]
    assert openers == ["decoding.py"]
