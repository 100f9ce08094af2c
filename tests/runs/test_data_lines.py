"""Every command says what it reads in one line, and its journal has the same; classes keep their names."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.artifacts.files import read_journal
from eqvae.images.image_sets import open_reference, open_samples
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runtime.processes import ALONE
from eqvae.runtime.run_folder import from_flat


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine pictures of three numbered classes, one of them broken in a way, and a file of words."""
    noise = np.random.default_rng(0)
    for index in range(9):
        path = tmp_path / "data" / str((9, 10, 100)[index % 3]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "data" / "words.txt").write_text("words")
    return tmp_path / "data"


LINE = "9 images, 3 classes (9, 10, 100), 1 left out (1 .txt)"


def test_encode(data: Path, tmp_path: Path, small_autoencoder, capsys: pytest.CaptureFixture[str]) -> None:
    config = EncodeConfig(
        autoencoder="small", data=str(data), out=tmp_path / "cache", image_size=16, num_workers=0, device="cpu"
    )
    encode(config, small_autoencoder)
    assert f"DATA: {LINE}\n" in capsys.readouterr().err
    (record,) = [record for record in read_journal(config.out) if record["kind"] == "data"]
    assert (record["num_images"], record["left_out"], record["class_names"]) == (9, {".txt": 1}, ["9", "10", "100"])
    assert json.loads((config.out / "index.json").read_text())["class_names"] == ["9", "10", "100"]


def test_classes_are_those_of_the_images_that_are_encoded(data: Path, tmp_path: Path, small_autoencoder) -> None:
    config = EncodeConfig(
        autoencoder="small", data=str(data), out=tmp_path / "cache", image_size=16, num_workers=0, device="cpu",
        num_images=5,
    )  # fmt: skip
    encode(config, small_autoencoder)
    index = json.loads((config.out / "index.json").read_text())
    assert (index["num_classes"], len(index["class_names"])) == (2, 2)


def test_classes_without_any_image_are_named(tmp_path: Path, small_autoencoder, capsys) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(100 if name == "cat" else 1):
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / f"{index:02}.png")
    (tmp_path / "data" / "dog" / "00.png").write_bytes(b"no picture")
    config = EncodeConfig(
        autoencoder="small", data=str(tmp_path / "data"), out=tmp_path / "cache", image_size=16, num_workers=0,
        device="cpu",
    )  # fmt: skip
    encode(config, small_autoencoder)
    assert "1 class (dog) has no image that can be read\n" in capsys.readouterr().err
    (record,) = [record for record in read_journal(config.out) if record["kind"] == "broken_image"]
    assert (Path(record["name"]).name, record["reason"][:17]) == ("00.png", "it is no JPEG, PN")


def test_finetune(data: Path, tmp_path: Path, small_autoencoder, capsys: pytest.CaptureFixture[str]) -> None:
    config = from_flat(
        FinetuneConfig, autoencoder="small", data=str(data), out=tmp_path / "run", image_size=32, device="cpu",
        num_workers=0, max_steps=1, batch_size=2, adversarial_weight=0.0, perceptual="none", precision="fp32",
        num_validation_images=1, num_statistics_images=2,
    )  # fmt: skip
    finetune(config, small_autoencoder)
    error = capsys.readouterr().err
    assert f"DATA: {LINE}\n" in error
    assert "VALIDATION DATA: 3 images, no classes (photographs)\n" in error
    kinds = [record["kind"] for record in read_journal(config.out)]
    assert (kinds.count("data"), kinds.count("validation_data")) == (1, 1)


def test_samples_and_references(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "set.npz", np.zeros((7, 16, 16, 3), np.uint8))
    open_samples(tmp_path / "set.npz").announce("SAMPLES", ALONE)
    reference = open_reference(str(data), image_size_px=64)
    reference.announce("REFERENCE", ALONE)
    list(reference.batches(range(2), batch_size=2, num_workers=0))
    assert capsys.readouterr().err.splitlines() == [
        "SAMPLES: 7 images of 16 px",
        f"REFERENCE: {LINE}",
        f"'{data}/10/1.png' has 40 x 40 px: images smaller than 64 px are enlarged to them",
    ]
    assert reference.summary()["left_out"] == {".txt": 1}
