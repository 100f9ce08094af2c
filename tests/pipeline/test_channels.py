"""Grey of 12 bits and five bands through whole commands, from a start made by `eqvae convert` to the report."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.artifacts.records import Pictures
from eqvae.artifacts.sample_sets import check_header
from eqvae.autoencoders import load_autoencoder
from eqvae.cli import run
from eqvae.images import open_images

WHITE = ("--white", "4095")
FINETUNE = (
    "--batch-size", "2", "--max-steps", "2", "--num-workers", "0", "--num-validation-images", "2", "--precision",
    "fp32", "--num-statistics-images", "4", "--device", "cpu", "--perceptual-weight", "0.5", *WHITE,
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of 12 bits in containers of 16, and the untrained starts of autoencoders for them: `grey` and `five`."""
    folder = tmp_path_factory.mktemp("channels")
    (folder / "grey").mkdir()
    (folder / "five").mkdir()
    photograph = open_images("photos").read(0)
    for index in range(8):
        picture = photograph.crop((40 * index, 0, 40 * index + 80, 80)).resize((40, 40))
        colours = np.asarray(picture).astype(np.uint16) * 16
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 16).save(folder / "grey" / f"{index}.tif")
        np.save(folder / "five" / f"{index}.npy", np.concatenate([colours, colours[::-1, :, :2]], axis=2))
    for name, channels in (("grey", 1), ("five", 5)):
        argv = ["convert", "untrained:tiny-kl-f2", str(folder / f"{name}-start"), "--channels", str(channels)]
        assert run(argv) == 0
    return folder


def finetune(start: Path, name: str, out: Path, *options: str) -> int:
    return run(["finetune", str(start / f"{name}-start"), "--data", str(start / name), "--out", str(out), *options])


def test_grey_is_finetuned_against_a_discriminator(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--image-size", "32", "--min-scale", "0.75", "--perceptual", "none", *FINETUNE)
    assert finetune(start, "grey", tmp_path / "run", *options) == 0
    said = capsys.readouterr().err
    assert "first image: grey of 16 bits, 0 is black and 4,095 white" in said
    assert (
        "VALIDATION DATA: 3 images, no classes (photographs); first image: red, green and blue of 8 bits, made" in said
    )
    assert load_autoencoder(str(tmp_path / "run")).image_channels == 1


def test_five_bands_are_finetuned_through_a_network_of_three(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--image-size", "16", "--adversarial-weight", "0", *FINETUNE)
    assert finetune(start, "five", tmp_path / "run", *options) == 2
    assert "--validation-data 'photos'" in capsys.readouterr().err
    assert finetune(start, "five", tmp_path / "run", "--validation-data", str(start / "five"), *options) == 0
    assert "CHANNELS: 5; networks trained on colours see (1, 2, 3) and (4, 5, 1), averaged" in capsys.readouterr().err
    assert load_autoencoder(str(tmp_path / "run")).image_channels == 5
    (picture,) = (tmp_path / "run" / "validation").glob("step_000000.png")
    with Image.open(picture) as drawn:
        assert drawn.mode == "RGB"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), [("grey", 1), ("five", 5)])
def test_the_whole_line(
    name: str, channels: int, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(start / name), {each: str(tmp_path / each) for each in ("eq", "ev", "z", "gen", "smp", "sc")}
    options = ("--image-size", "16", "--adversarial-weight", "0", "--validation-data", data, *FINETUNE)
    assert finetune(start, name, tmp_path / "eq", *options) == 0
    size, features = ("--image-size", "16", "--num-workers", "0"), ("--features", "efficientnet-lite0")
    for argv in (
        ["evaluate", out["eq"], "--data", data, "--out", out["ev"], "--all", *size, *features, *WHITE],
        ["encode", out["eq"], "--data", data, "--out", out["z"], "--precision", "fp32", *size, *WHITE],
        ["train", "repa-sit-ti-2", "--latents", out["z"], "--out", out["gen"], "--max-steps", "2", "--batch-size", "4",
         "--teacher", "efficientnet-lite0", "--reference", data, *features, "--num-watch-samples", "4",
         "--watch-steps", "2"],
        ["sample", out["gen"], "--num-samples", "6", "--num-steps", "2", "--out", out["smp"]],
        ["score", out["smp"], "--reference", data, "--out", out["sc"], "--num-workers", "0", *features, *WHITE],
        ["report", *(out[each] for each in out if each != "z"), "--out", str(tmp_path / "report.html")],
    ):  # fmt: skip
        assert run(argv) == 0, argv
    assert check_header(tmp_path / "smp" / "samples.npz") == (6, 16, 16, channels)
    with Image.open(tmp_path / "smp" / "samples.png") as sheet:
        assert sheet.mode == ("L" if channels == 1 else "RGB")
    pictures = Pictures.read(tmp_path / "ev" / "pictures.safetensors")
    assert pictures.shows == ("" if channels == 1 else "channels 1, 2, 3 of 5")
    assert ("channels 1, 2, 3 of 5" in (tmp_path / "report.html").read_text()) == (channels == 5)
    capsys.readouterr()
    argv = [
        "score",
        out["smp"],
        "--reference",
        "photos",
        "--out",
        str(tmp_path / "no"),
        *features,
        "--num-workers",
        "0",
    ]
    assert run(argv) == (2 if channels == 5 else 0)
    if channels == 5:
        assert "it has 3 channels, and the autoencoder takes 5" in capsys.readouterr().err
