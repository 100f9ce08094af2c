"""Every command on several processes: one's losses, bytes and figures; any number resumes; one lost ends all."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eqvae.artifacts.files import read_journal, read_json

pytestmark = pytest.mark.slow

CPU = ("--num-workers", 0, "--device", "cpu")
TRAIN = ("--batch-size", 4, "--log-every", 1, "--watch-steps", 2, "--sample-every", 100, "--num-watch-samples", 4,
         "--precision", "fp32", "--device", "cpu", "--ema-decay", 0.5)  # fmt: skip
FINETUNE = ("--adversarial-weight", 0, "--perceptual", "none", "--precision", "fp32",
            "--image-size", 64, "--log-every", 1, "--num-validation-images", 4, "--num-statistics-images", 6,
            "--batch-size", 4)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than are read in a second."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(400):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{index:04}.png")
    return folder


@pytest.fixture(scope="module")
def made(forks, eight_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in `latents` and a trained generator in `run`, by one process."""
    folder = tmp_path_factory.mktemp("made")
    encode = ("encode", "untrained:tiny-kl", "--data", eight_images, "--image-size", 64, "--batch-size", 2)
    forks.run(1, (*encode, "--out", folder / "latents", "--shard-size", 2, *CPU))
    forks.run(
        1, ("train", "dit-ti-4", "--latents", folder / "latents", "--out", folder / "run", "--max-steps", 4, *TRAIN)
    )
    return folder


def losses(out: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in read_journal(out) if record["kind"] == "train"]


def bytes_of(folder: Path, pattern: str) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.glob(pattern)}
    assert found
    return found


def figures(out: Path) -> dict[str, float]:
    return {
        name: value
        for name, value in read_json(out / "metrics.json").items()
        if isinstance(value, int | float) and not name.endswith(("_sec", "share_of_peak"))
    }


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_is_one(forks, made: Path, eight_images: Path, tmp_path: Path, count: int):
    encode = ("encode", "untrained:tiny-kl", "--data", eight_images, "--image-size", 64, "--batch-size", 2)
    forks.run(count, (*encode, "--out", tmp_path / "latents", "--shard-size", 2, *CPU))
    assert bytes_of(tmp_path / "latents", "*.safetensors") == bytes_of(made / "latents", "*.safetensors")
    (tmp_path / "latents" / "shard-00001.safetensors").unlink()  # another number of processes makes it again
    forks.run(6 - count, (*encode, "--out", tmp_path / "latents", "--shard-size", 2, *CPU))
    assert bytes_of(tmp_path / "latents", "*.safetensors") == bytes_of(made / "latents", "*.safetensors")

    train = ("train", "dit-ti-4", "--latents", made / "latents", "--out", tmp_path / "run", *TRAIN)
    forks.run(count, (*train, "--max-steps", 2), stop_at=1)
    forks.run(6 - count, (*train, "--max-steps", 3))
    forks.run(count, (*train, "--max-steps", 4))
    assert losses(tmp_path / "run") == pytest.approx(losses(made / "run"), rel=1e-5)
    assert len(losses(tmp_path / "run")) == 4

    sample = ("sample", made / "run", "--num-samples", 600, "--num-steps", 2, "--device", "cpu")
    for number, out in ((1, made / "samples"), (count, tmp_path / "samples")):
        if not out.exists():
            forks.run(number, (*sample, "--out", out))
    assert (tmp_path / "samples" / "samples.npz").read_bytes() == (made / "samples" / "samples.npz").read_bytes()


def test_two_processes_adapt_as_one(forks, made: Path, eight_images: Path, tmp_path: Path):
    encode = ("encode", "tiny-kl", "--data", eight_images, "--image-size", 64, "--batch-size", 2, *CPU)
    forks.run(1, (*encode, "--out", tmp_path / "latents"))
    adapt = ("adapt", made / "run", "--latents", tmp_path / "latents", "--align-steps", 2, *TRAIN)
    forks.run(1, (*adapt, "--out", tmp_path / "one", "--max-steps", 4))
    forks.run(2, (*adapt, "--out", tmp_path / "two", "--max-steps", 3))  # into the second stretch
    forks.run(2, (*adapt, "--out", tmp_path / "two", "--max-steps", 4))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(tmp_path / "two")) == 4


def test_four_processes_measure_and_finetune_as_one(forks, eight_images: Path, tmp_path: Path):
    score = ("score", eight_images, "--reference", eight_images, "--features", "efficientnet-lite0", *CPU)
    evaluate = ("evaluate", "untrained:tiny-kl", "--data", eight_images, "--image-size", 64, "--batch-size", 2, *CPU)
    evaluate += ("--features", "efficientnet-lite0", "--no-lpips")
    finetune = ("finetune", "untrained:tiny-kl", "--data", eight_images, "--validation-data", eight_images)
    finetune += (*FINETUNE, "--max-steps", 2, "--learning-rate", "1e-6", *CPU)  # a step of Adam is of its size
    for command in (score, evaluate, finetune):
        one, four = (tmp_path / f"{command[0]}-{count}" for count in (1, 4))
        forks.run(1, (*command, "--out", one))
        outcome = forks.run(4, (*command, "--out", four))
        assert outcome.said.count("images, ") <= 4  # one process speaks
        assert figures(four) == pytest.approx(figures(one), rel=1e-4, abs=1e-4)
        assert read_json(four / "environment.json")["num_processes"] == 4
    for name in ("reconstruction", "l1", "kl"):
        ours, theirs = (losses(tmp_path / f"finetune-{count}", name) for count in (4, 1))
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("ends_all", [True, False], ids=["torchrun", "nobody_else"])
@pytest.mark.parametrize("command", ["encode", "train", "sample", "score"])
def test_a_killed_process_ends_all(forks, made: Path, pictures: Path, tmp_path: Path, command: str, ends_all: bool):
    out, samples = (
        tmp_path / "out",
        ("sample", made / "run", "--num-samples", 600, "--num-steps", 2, "--device", "cpu"),
    )
    encode = ("encode", "untrained:tiny-kl", "--data", pictures, "--image-size", 64, "--shard-size", 8, *CPU)
    arguments: dict[str, tuple[object, ...]] = {
        "encode": (*encode, "--batch-size", 8),
        "train": ("train", "dit-ti-4", "--latents", made / "latents", "--max-steps", 100_000, *TRAIN),
        "sample": samples,
        "score": (
            "score",
            pictures,
            "--reference",
            pictures,
            "--features",
            "efficientnet-lite0",
            "--batch-size",
            4,
            *CPU,
        ),
    }
    under_way: dict[str, Callable[[], bool]] = {
        "encode": lambda: any(out.glob("shard-*.safetensors")),
        "train": lambda: (out / "journal.jsonl").exists() and len(losses(out)) > 3,
        "sample": lambda: any(out.glob("parts/*.safetensors")),
        "score": lambda: "reference" in job.said or time.monotonic() > began_sec + 3,
    }
    job, began_sec = forks.start(2, (*arguments[command], "--out", out), ends_all=ends_all), time.monotonic()
    while not under_way[command]():
        assert time.monotonic() < began_sec + 120, job.said
        time.sleep(0.02)
    os.kill(job.numbers[1], signal.SIGKILL)
    killed_sec = time.monotonic()
    outcome = job.end()
    assert time.monotonic() - killed_sec < 15
    assert outcome.codes == [130, -signal.SIGKILL], outcome.said
    assert len(outcome.lines) == 1, outcome.said
    assert "Traceback" not in outcome.said
    assert not (out / "metrics.json").exists()
    if command in ("encode", "sample") and ends_all:
        torch.set_num_threads(1)
        forks.run(1, (*arguments[command], "--out", out))
        forks.run(2, (*arguments[command], "--out", tmp_path / "straight"))
        for name, content in bytes_of(tmp_path / "straight", "*.[sn][ap]*").items():
            assert (out / name).read_bytes() == content, name
