"""`eqvae sample` from end to end: one archive however it is drawn, wrong input in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eqvae.cli import run

FAST = [
    "--num-samples", "12", "--num-steps", "2", "--batch-size", "5", "--precision", "fp32", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dit-ti-4` trained for two steps on eight images of two classes."""
    folder, random = tmp_path_factory.mktemp("sample"), np.random.default_rng(0)
    for index in range(8):
        path = folder / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    encoding = ["--image-size", "64", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    training = ["--max-steps", "2", "--batch-size", "4", "--watch-steps", "2", "--device", "cpu", "--ema-decay", "0.5"]
    autoencoder = "untrained:tiny-kl"
    assert run(["encode", autoencoder, "--data", f"{folder}/data", "--out", f"{folder}/cache", *encoding]) == 0
    assert run(["train", "dit-ti-4", "--latents", f"{folder}/cache", "--out", f"{folder}/run", *training]) == 0
    return folder / "run"


@pytest.fixture
def arguments(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line; later flags win."""

    def make(*more: object, out: str = "out") -> list[str]:
        return ["sample", str(trained), "--out", str(tmp_path / out), *FAST, *map(str, more)]

    return make


def images_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"]


def test_sampling(arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(arguments("--guidance-scale", 1.5, "--classes", "1")) == 0
    printed = capsys.readouterr().out
    assert printed == (
        f"12 samples in '{tmp_path / 'out' / 'samples.npz'}', a sheet of them in '{tmp_path / 'out' / 'samples.png'}'\n"
    )
    assert images_of(tmp_path / "out").shape == (12, 64, 64, 3)
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as archive:
        assert archive["arr_1"].tolist() == [1] * 12


def test_classes_keep_their_names_from_folder_to_sheet(arguments, trained: Path, tmp_path: Path):
    assert run(arguments("--classes", "b")) == 0
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as archive:
        assert archive["arr_1"].tolist() == [1] * 12
    for card in (trained.parent / "cache" / "index.json", trained / "generator" / "generator.json"):
        assert json.loads(card.read_text())["class_names"] == ["a", "b"]
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        assert sheet.width > 10 * (64 + 2) + 2  # a name beside each row


@pytest.mark.parametrize(
    ("more", "what"),
    [(("--sampler", "heun"), "--sampler heun is not for 'dit-ti-4'"), (("--sampler", "magic"), "magic"),
     (("--classes", "0,2"), "Class 2 is not one"), (("--classes", "cats"), "Use balanced, random"),
     (("--num-samples", "0"), "--num-samples is 0"), (("--autoencoder", "untrained:tiny-kl-f2"), "has other weights"),
     (("--sigma-rel", "0.1"), "Train with --posthoc-ema"), (("--weak-run", "no/such"), "holds no trained generator"),
     (("--guidance-low", "2"), "no interval"), (("--guidance-scal", "2"), "Did you mean '--guidance-scale'?"),
     (("--num-steps", "1001"), "1001"), (("--out", "RUN"), "belongs to 'eqvae train'")],
)  # fmt: skip
def test_wrong_input_is_one_line(arguments, trained: Path, tmp_path: Path, capsys, more: tuple[str, ...], what: str):
    assert run(arguments(*[str(trained) if argument == "RUN" else argument for argument in more])) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("eqvae: ")
    assert what in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_writes_into(arguments, tmp_path: Path, refused_while_held):
    refused_while_held(arguments(), tmp_path / "out")


def test_other_flags_in_the_same_folder(arguments, capsys):
    assert run(arguments()) == 0
    capsys.readouterr()
    assert run(arguments("--batch-size", 7)) == 0
    assert run(arguments("--seed", 1)) == 2
    assert "--seed 0, not 1" in capsys.readouterr().err


# Processes of their own ---------------------------------------------------------------------------------------------


def start(launcher: list[str], arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_draw_the_same_images(arguments, tmp_path: Path):
    more = ("--num-samples", 300)  # two parts
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eqvae"]
    process = start(launcher, arguments(*more, out="two"))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len(printed.splitlines()) == 1
    torch.set_num_threads(1)
    assert run(arguments(*more, out="one")) == 0
    assert np.array_equal(images_of(tmp_path / "two"), images_of(tmp_path / "one"))


@pytest.mark.slow
def test_killed_and_continued(arguments, tmp_path: Path):
    more = ("--num-samples", 240, "--num-steps", 10)
    process = start(["-m", "eqvae"], arguments(*more, out="broken"))
    parts = tmp_path / "broken" / "parts"
    for _ in range(2400):
        if parts.exists() and any(path.suffix == ".safetensors" for path in parts.iterdir()):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    torch.set_num_threads(1)
    assert run(arguments(*more, out="broken")) == 0
    assert run(arguments(*more, out="straight")) == 0
    assert (tmp_path / "broken" / "samples.npz").read_bytes() == (tmp_path / "straight" / "samples.npz").read_bytes()


@pytest.mark.parametrize(("command", "help"), [
    ("finetune", "--gradient-accumulation-steps, --precision bf16, --batch-size, --image-size"),
    ("train", "--gradient-accumulation-steps, --gradient-checkpointing, --precision bf16, --batch-size, "
              "--shard on several devices"),
    ("sample", "--batch-size, --precision bf16"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command, help
):
    for module in ("runtime", "runs"):
        monkeypatch.setattr(f"eqvae.{module}.memory.free_bytes", lambda device: 2**28)
    data, cache = (str(trained.parent / name) for name in ("data", "cache"))
    arguments = {
        "finetune": ["untrained:tiny-kl", "--data", data, "--image-size", "64", "--batch-size", "2", "--max-steps", "2",
                     "--adversarial-weight", "0", "--perceptual", "none"],
        "train": ["dit-ti-4", "--latents", cache, "--batch-size", "2", "--max-steps", "2", "--watch-steps", "2"],
        "sample": [str(trained), *FAST],
    }[command]  # fmt: skip
    assert run([command, *arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("eqvae: this run does not fit: its ")
    assert error.endswith(f"GiB of memory, and 0.2 GiB are free. These help: {help}")
    assert not (tmp_path / "out").exists()
