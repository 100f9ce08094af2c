"""`eqvae train` from end to end: wrong input in one line, signals, several processes."""

import json
import os
import shutil
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
from torch import Tensor

from eqvae.artifacts.files import read_journal, read_json, read_tensors, write_json
from eqvae.cli import run

FAST = [
    "--max-steps", "6", "--batch-size", "4", "--log-every", "1", "--checkpoint-every", "2", "--watch-steps", "2",
    "--sample-every", "100", "--num-watch-samples", "4", "--precision", "fp32", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eight images of two classes: 4 x 8 x 8."""
    folder, random = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    for index in range(8):
        path = folder / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    flags = ["--image-size", "64", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    assert run(["encode", "untrained:tiny-kl", "--data", f"{folder}/data", "--out", f"{folder}/cache", *flags]) == 0
    return folder / "cache"


@pytest.fixture
def arguments(latents: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line; later flags win."""

    def make(*more: object, recipe: str = "dit-ti-4", out: str = "run") -> list[str]:
        return ["train", recipe, "--latents", str(latents), "--out", str(tmp_path / out), *FAST, *map(str, more)]

    return make


def checkpoint(out: Path) -> dict[str, Tensor]:
    return read_tensors(out / "checkpoint.safetensors")[0]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_journal(out) if record["kind"] == "train"]


def test_training(arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(arguments("--reference", tmp_path / "run", "--dry-run")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["num_tokens"], plan["config"]["recipe"]) == (4, "dit-ti-4")
    assert not (tmp_path / "run").exists()
    assert run(arguments("--max-steps", 2)) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("2 steps, ")
    assert printed.out.endswith(f"generator in '{tmp_path / 'run'}'\n")
    assert "train: 2/2 steps" in printed.err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint.safetensors", "config.json", "environment.json", "generator", "journal.jsonl", "metrics.json",
        "samples",
    }  # fmt: skip
    assert read_json(tmp_path / "run" / "config.json")["command"] == "train"


@pytest.mark.parametrize(
    ("more", "what"),
    [(("--batch-size", "6", "--gradient-accumulation-steps", "4"), "Choose a multiple of 4"),
     (("--latents", "no/such"), "'no/such' does not exist"), (("--learning-rat", "1"), "Did you mean"),
     (("--latents", "FILES"), "is no latent cache"), (("--out", "FILES"), "holds no 'eqvae train' run"),
     (("--reference", "no/such"), "no/such"), (("--autoencoder", "tiny-kl-f3"), "tiny-kl-f3"),
     (("--normalization", "fixed:0"), "fixed:0")],
)  # fmt: skip
def test_wrong_input_is_one_line(arguments, tmp_path: Path, capsys, more: tuple[str, ...], what: str):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "something.txt").write_text("")
    given = [str(tmp_path / "files") if argument == "FILES" else argument for argument in more]
    assert run(arguments(*given)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("eqvae: ")
    assert what in line
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "what"),
    [("dit-ti-3", "Did you mean 'dit-ti-"), ("sit-x-2", "Did you mean 'sit-xl-2'"), ("maskgit", "no generator")],
)
def test_an_unknown_recipe(arguments, capsys, recipe: str, what: str):
    assert run(arguments(recipe=recipe)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line


def test_latents_of_other_images_are_not_resumed_on(arguments, latents: Path, tmp_path: Path, capsys):
    shutil.copytree(latents, tmp_path / "cache")
    encode = json.loads((latents / "config.json").read_text())
    flags = ["--image-size", "64", "--batch-size", "4", "--num-workers", "0", "--device", "cpu", "--num-images"]
    begin = ["encode", encode["autoencoder"], "--data", encode["data"], "--out", str(tmp_path / "few"), *flags]
    assert run([*begin, "4"]) == 0
    more = ("--latents", tmp_path / "few", "--batch-size", 2)
    assert run(arguments("--max-steps", 1, *more)) == 0
    assert run([*begin, "8"]) == 0
    capsys.readouterr()
    assert run(arguments("--max-steps", 2, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a run on latents of other images than" in line


def test_latents_that_were_encoded_otherwise_are_not_resumed_on(arguments, latents: Path, tmp_path: Path, capsys):
    encode = read_json(latents / "config.json")

    def encode_again(size: int) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        flags = ["--image-size", str(size), "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
        assert (
            run(["encode", encode["autoencoder"], "--data", encode["data"], "--out", f"{tmp_path / 'cache'}", *flags])
            == 0
        )

    encode_again(64)
    more = ("--latents", tmp_path / "cache")
    assert run(arguments("--max-steps", 1, *more)) == 0
    encode_again(64)  # the same latents
    assert run(arguments("--max-steps", 2, *more)) == 0
    encode_again(32)
    capsys.readouterr()
    assert run(arguments("--max-steps", 3, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a run on latents of another encoding than" in line
    saved = read_json(tmp_path / "run" / "config.json")
    write_json(tmp_path / "run" / "config.json", {key: saved[key] for key in saved if key != "latents_digest"})
    encode_again(64)
    assert run(arguments("--max-steps", 3, *more)) == 0  # as a run of an earlier version


def test_a_folder_that_another_process_writes_into(arguments, tmp_path: Path, refused_while_held):
    refused_while_held(arguments(), tmp_path / "run")


def test_another_run_in_the_folder(arguments, capsys):
    assert run(arguments("--max-steps", 1)) == 0
    capsys.readouterr()
    for more, recipe, what in [
        (("--max-steps", 1, "--seed", 1), "dit-ti-4", "--seed 0, not 1"),
        (("--max-steps", 1), "sit-ti-4", "--recipe dit-ti-4, not sit-ti-4"),
    ]:
        assert run(arguments(*more, recipe=recipe)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert what in line


# Processes of their own ---------------------------------------------------------------------------------------------

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")} | {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eqvae"]
ACCELERATE = [
    "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "eqvae",
]  # fmt: skip


def start(launcher: list[str], arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Return when the journal has come to a step."""
    for _ in range(2400):
        if (out / "journal.jsonl").exists() and any(at >= step for at, _ in losses(out)):
            return
        if process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.05)
    pytest.fail("it did not come to that step")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_bit_by_bit(arguments, tmp_path: Path, number: int, code: int):
    more = ("--max-steps", 60, "--log-every", 3, "--checkpoint-every", 10, "--batch-size", 4)
    process = start(["-m", "eqvae"], arguments(*more, out="broken"))
    wait_for_step(process, tmp_path / "broken", 12)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert printed == ""
    if number == signal.SIGTERM:
        (line,) = [line for line in errors.splitlines() if line.startswith("eqvae: ")]
        assert "interrupted, SIGTERM at step" in line
        assert "Traceback" not in errors
    torch.set_num_threads(1)  # other numbers of threads add up in another order
    assert run(arguments(*more, out="broken")) == 0
    assert run(arguments(*more, out="straight")) == 0
    one, other = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "broken")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_train_as_one(arguments, tmp_path: Path, capsys, launcher: list[str]):
    more = ("--gradient-accumulation-steps", 2, "--reference", tmp_path / "images", "--ema-decay", 0.5)
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(1)
    for index in range(4):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    process = start(launcher, arguments(*more, out="two"))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [line for line in printed.splitlines() if "generator in" in line] == printed.splitlines()
    assert len(printed.splitlines()) == 1
    assert run(arguments(*more, out="one")) == 0
    assert [step for step, _ in losses(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), rtol=1e-5, atol=1e-6
    )
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith("ema."):  # Adam's first steps turn rounding of tiny gradients into steps of 1e-4
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)
    found, expected = (read_json(tmp_path / out / "metrics.json")["fd_efficientnet_lite0"] for out in ("two", "one"))
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(arguments, tmp_path: Path):
    """They stop at the same step, and say it once."""
    process = start(TORCHRUN, arguments("--max-steps", 4000))
    wait_for_step(process, tmp_path / "run", 4)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    stops = [line for line in errors.splitlines() if "eqvae: interrupted, SIGTERM at step" in line]
    assert len(stops) == 1
    saved = read_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]
    assert json.loads(saved["numbers"])["step"] == losses(tmp_path / "run")[-1][0]


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share(arguments):
    process = start(TORCHRUN, arguments("--batch-size", 5))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--batch-size 5 can't be split over 2 processes and 1 equal parts. Choose a multiple of 2" in errors
