"""Wrong input: exit code 2 and one line that names it, no traceback, and nothing left behind."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.artifacts.files import write_json
from eqvae.cli import run

TINY = "untrained:tiny-kl"


@pytest.fixture
def fails(capsys, tmp_path):
    """A function that runs a command into `--out`, which must fail in one line, and returns the line."""

    def check(*arguments: object, out: Path | None = None) -> str:
        folder = tmp_path / "out" if out is None else out
        existed = folder.exists()
        code = run([*map(str, arguments), "--out", str(folder)])
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("eqvae: ")
        assert "Traceback" not in line
        assert "\x1b" not in line
        assert folder.exists() == existed
        return line

    return check


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of 64 px."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


both = pytest.mark.parametrize("command", ["finetune", "evaluate"])

# Data ---------------------------------------------------------------------------------------------------------------


@both
def test_a_missing_data_folder(fails, command):
    assert "no/such/folder" in fails(command, TINY, "--data", "no/such/folder")


@both
def test_an_empty_data_folder(fails, tmp_path, command):
    (tmp_path / "empty").mkdir()
    line = fails(command, TINY, "--data", tmp_path / "empty")
    assert str(tmp_path / "empty") in line
    assert "no image" in line


@both
def test_a_folder_of_text_files(fails, tmp_path, command):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(2):
        (folder / f"{index}.txt").write_text("no image")
    line = fails(command, TINY, "--data", folder)
    assert "2 other files" in line
    assert ".png" in line


@both
def test_a_misspelt_kind_of_data(fails, command):
    assert "Did you mean 'photos'?" in fails(command, TINY, "--data", "photo")


def test_text_files_named_as_images(fails, tmp_path):
    folder = tmp_path / "pretenders"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.png").write_text("no image")
    line = fails("evaluate", TINY, "--data", folder, "--image-size", 64, "--num-workers", 0)
    assert "broken" in line
    assert "0.png" in line


def test_more_images_than_there_are(fails, images):
    line = fails("evaluate", TINY, "--data", images, "--num-images", 4, "--image-size", 64)
    assert "--num-images 4" in line
    assert "3 images" in line


# Autoencoders -------------------------------------------------------------------------------------------------------


@both
def test_an_unknown_preset(fails, command):
    assert "Did you mean 'tiny-kl'?" in fails(command, "tiny-kk", "--data", "photos")
    assert "Did you mean 'tiny-kl'?" in fails(command, "untrained:tiny-kk", "--data", "photos")


@both
def test_a_missing_checkpoint(fails, command):
    assert "no/such.ckpt" in fails(command, "no/such.ckpt", "--data", "photos")


@both
def test_a_hub_id_without_network(fails, command):
    line = fails(command, "somebody/some-vae", "--data", "photos")
    assert "somebody/some-vae" in line


@both
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint(fails, tmp_path, saved_autoencoder, command, keep):
    folder = shutil.copytree(saved_autoencoder, tmp_path / "truncated")
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: int(keep * len(content))])
    line = fails(command, folder, "--data", "photos")
    assert weights.name in line
    assert "truncated" in line


def test_a_checkpoint_without_its_weights(fails, tmp_path, saved_autoencoder):
    shutil.copy(saved_autoencoder / "config.json", tmp_path)
    assert "no weights" in fails("evaluate", tmp_path, "--data", "photos", out=tmp_path / "new")


class Malicious:
    """Runs a command when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("poisoned", ["encoder", "decoder"])
def test_a_checkpoint_that_holds_code(fails, tmp_path, poisoned):
    import torch

    folder, marker = tmp_path / "pair", tmp_path / "marker"
    folder.mkdir()
    for part in ("encoder", "decoder"):
        torch.save({"0.weight": torch.zeros(1)}, folder / f"x_{part}.pth")
    (folder / f"x_{poisoned}.pth").write_bytes(pickle.dumps({"0.weight": Malicious(marker)}))
    line = fails("evaluate", folder, "--data", "photos")
    assert f"x_{poisoned}.pth" in line
    assert "code" in line
    assert not marker.exists()
    torch.save({"0.weight": Malicious(marker)}, folder / f"x_{poisoned}.pth")  # the same in torch's own container
    assert "code" in fails("finetune", folder, "--data", "photos")
    assert not marker.exists()


@both
def test_a_run_that_has_not_finished(fails, tmp_path, command):
    folder = tmp_path / "run"
    write_json(folder / "config.json", {"command": "finetune", "autoencoder": "tiny-kl"})
    line = fails(command, folder, "--data", "photos")
    assert f"'{folder}' has not finished" in line
    assert "same 'eqvae finetune' command goes on" in line


def test_an_evaluation_is_no_autoencoder(fails, tmp_path):
    folder = tmp_path / "evaluation"
    write_json(folder / "config.json", {"command": "evaluate", "autoencoder": "tiny-kl"})
    assert f"'{folder}' was written by 'eqvae evaluate' and holds no autoencoder" in fails(
        "evaluate", folder, "--data", "photos"
    )


# Values -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("size", [0, -64, 8, 63, 80])
def test_an_image_size_that_does_not_fit(fails, command, size):
    line = fails(command, TINY, "--data", "photos", "--image-size", size, "--device", "cpu")
    assert f"--image-size is {size}" in line or f"--image-size {size}" in line


def test_the_nearest_image_sizes_are_named(fails):
    line = fails("evaluate", TINY, "--data", "photos", "--image-size", 100)
    assert "96" in line
    assert "128" in line


@both
@pytest.mark.parametrize("device", ["nonsense", "cuda:77", "mps:3", "-1"])
def test_a_device_that_is_not_here(fails, command, device):
    line = fails(command, TINY, "--data", "photos", "--image-size", 64, f"--device={device}")
    assert device in line


def test_an_unknown_set_of_transforms(fails):
    assert "Did you mean 'rotation'?" in fails("finetune", TINY, "--data", "photos", "--transforms", "rotations")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--equivariance-probability", 2),
        ("--equivariance-probability", -0.5),
        ("--min-scale", 1.5),
        ("--max-steps", 0),
        ("--batch-size", 0),
        ("--learning-rate", 0),
        ("--learning-rate", "nan"),
        ("--seed", -1),
        ("--num-workers", -1),
        ("--adam-beta2", 1),
        ("--ema-decay", 2),
    ],
)
def test_a_value_out_of_range(fails, flag, value):
    line = fails("finetune", TINY, "--data", "photos", flag, value)
    assert flag.strip("-").replace("-", "_") in line.replace("-", "_")
    assert str(value) in line


@pytest.mark.parametrize("flag", ["--num-images", "--batch-size", "--num-pictures", "--num-workers"])
def test_an_evaluations_value_out_of_range(fails, flag):
    assert flag in fails("evaluate", TINY, "--data", "photos", "--image-size", 64, flag, -1)


# Flags --------------------------------------------------------------------------------------------------------------


def test_an_unknown_flag(fails):
    line = fails("finetune", TINY, "--data", "photos", "--leaning-rate", "0.1")
    assert "--leaning-rate" in line
    assert "Did you mean '--learning-rate'?" in line
    assert "--image-size" in fails("evaluate", TINY, "--data", "photos", "--image-sise=64")


@both
def test_a_missing_flag(fails, command):
    assert "--data" in fails(command, TINY)


def test_a_missing_output_folder(capsys):
    assert run(["evaluate", TINY, "--data", "photos"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out" in line


@both
def test_a_missing_autoencoder(fails, command):
    assert "AUTOENCODER" in fails(command, "--data", "photos").upper()


@pytest.mark.parametrize(
    ("flag", "value"), [("--batch-size", "many"), ("--learning-rate", "slow"), ("--precision", "fp8")]
)
def test_a_value_of_the_wrong_type(fails, flag, value):
    line = fails("finetune", TINY, "--data", "photos", flag, value)
    assert flag in line
    assert value in line


def test_a_boolean_that_is_neither_true_nor_false(fails):
    assert "'perhaps'" in fails("finetune", TINY, "--data", "photos", "--flip", "perhaps")
    assert "perhaps" in fails("finetune", TINY, "--data", "photos", "--flip=perhaps")
    assert "'--no-data'" in fails("finetune", TINY, "--data", "photos", "--no-data")


# YAML ---------------------------------------------------------------------------------------------------------------


def test_a_yaml_with_an_unknown_key(fails, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: photos\nleaning_rate: 0.1\n")
    line = fails("finetune", TINY, "--config", path)
    assert str(path) in line
    assert "'leaning_rate'" in line
    assert "Did you mean 'learning_rate'?" in line


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words", "", "a: [", "a: b: c", "\x00"])
def test_a_yaml_that_is_no_mapping(fails, tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert str(path) in fails("finetune", TINY, "--config", path)


def test_a_yaml_that_is_not_there(fails, tmp_path):
    assert "none.yaml" in fails("finetune", TINY, "--config", tmp_path / "none.yaml")
    assert str(tmp_path) in fails("finetune", TINY, f"--config={tmp_path}")
    assert "--config" in fails("finetune", TINY, "--data", "photos", "--config")


def test_a_yaml_with_a_value_of_the_wrong_type(fails, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: photos\nbatch_size: many\n")
    assert "many" in fails("finetune", TINY, "--config", path)


# Output folders -----------------------------------------------------------------------------------------------------


@both
def test_an_output_folder_that_is_a_file(fails, tmp_path, images, command):
    path = tmp_path / "file"
    path.write_text("years of work")
    arguments = (command, TINY, "--data", images, "--image-size", 64, "--adversarial-weight", 0)
    arguments = arguments if command == "finetune" else arguments[:-2]
    assert str(path) in fails(*arguments, out=path)
    assert str(path) in fails(*arguments, out=path / "below")
    assert path.read_text() == "years of work"


@both
def test_an_output_folder_that_holds_something_else(fails, tmp_path, images, command):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    arguments = (command, TINY, "--data", images, "--image-size", 64, "--adversarial-weight", 0)
    arguments = arguments if command == "finetune" else arguments[:-2]
    assert str(folder) in fails(*arguments, out=folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@both
def test_an_output_folder_whose_name_is_no_text(fails, tmp_path, command):
    out = tmp_path / os.fsdecode(b"run\xe9")
    assert "run\\xe9' is no text in UTF-8. Choose" in fails(command, TINY, "--data", "photos", out=out)


@both
def test_an_output_folder_where_nothing_can_be_made(fails, command):
    line = fails(command, TINY, "--data", "photos", "--image-size", 64, out=Path("/proc/x"))
    assert "--out '/proc/x'" in line


@both
@pytest.mark.parametrize("wrong", ["data", "out", "device"])
def test_cheap_checks_come_before_the_autoencoder(fails, tmp_path, monkeypatch, command, wrong):
    def never(name: str) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(f"eqvae.runs.{command}.load_autoencoder", never)
    (tmp_path / "file").touch()
    data = tmp_path / "missing" if wrong == "data" else "photos"
    device = "nonsense" if wrong == "device" else "cpu"
    fails(command, TINY, "--data", data, "--device", device, out=tmp_path / "file" if wrong == "out" else None)


# Commands -----------------------------------------------------------------------------------------------------------


def test_an_unknown_command(capsys):
    assert run(["fintune", "sd-vae"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "eqvae: eqvae has no command 'fintune'. Did you mean 'finetune'?"


def test_no_command_shows_the_usage(capsys):
    assert run([]) == 2
    assert "usage: eqvae COMMAND" in capsys.readouterr().out


def test_a_report_of_nothing(fails, tmp_path):
    page = tmp_path / "page.html"
    assert str(tmp_path / "missing") in fails("report", tmp_path / "missing", out=page)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in fails("report", tmp_path / "empty", out=page)
    fails("report", out=page)


def test_a_report_onto_a_folder(fails, tmp_path):
    (tmp_path / "folder").mkdir()
    assert str(tmp_path) in fails("report", tmp_path / "missing", out=tmp_path / "folder")


@pytest.mark.parametrize("target", ["page", "figures"])
def test_a_report_below_a_file(fails, tmp_path, monkeypatch, target):
    def never(*_: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr("eqvae.drawing.page.read_folders", never)
    file = tmp_path / "file"
    file.write_text("years of work")
    page = file / "page.html" if target == "page" else tmp_path / "page.html"
    flags = ("--figures", file) if target == "figures" else ()
    assert f"'{file}' is no folder" in fails("report", tmp_path, *flags, out=page)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "No space left on device. Check the path"),
        (PermissionError(13, "Permission denied", "/a/b"), "Permission denied: '/a/b'. Check the path"),
        (OSError("a library's\nown words"), "a library's own words"),
    ],
)
def test_what_the_system_refuses_is_one_line(fails, monkeypatch, error, says):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("eqvae.runs.report.write_report", refuse)
    assert says in fails("report", "folder")
