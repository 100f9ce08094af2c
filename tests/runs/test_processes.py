"""Fine-tuning and evaluation on several processes: one process's results, any number resumes, all end together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from eqvae.artifacts.files import read_journal, read_json, read_tensors

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
WEIGHTS = "autoencoder/diffusion_pytorch_model.safetensors"

# At a low rate: Adam's first steps of the discriminator blow up what differs in the last digits.
KL = ("untrained:tiny-kl", "--discriminator-warmup-steps", "1", "--image-size", "128", "--learning-rate", "1e-5")
ACCUMULATING = ("untrained:tiny-kl", "--adversarial-weight", "0", "--gradient-accumulation-steps", "2",
                "--image-size", "64", "--max-grad-norm", "0.01")  # fmt: skip
VQ = ("untrained:tiny-vq", "--codebook", "ema", "--restart-dead-codes", "2", "--adversarial-weight", "0",
      "--image-size", "64")  # fmt: skip
METHODS = ("untrained:tiny-kl", "--method", "photometric:0.5 + detok:0.25 + lmr:0.25 + vf", "--adversarial-weight", "0",
           "--image-size", "64")  # fmt: skip


def arguments(photographs: Path, out: Path, *more: str) -> list[str]:
    data = ("--data", str(photographs), "--validation-data", str(photographs), "--out", str(out))
    return [
        "-m", "eqvae", "finetune", "--learning-rate", "1e-4", *more, *data, "--max-steps", "4", "--batch-size", "4",
        "--log-every", "1", "--lr-warmup-steps", "1", "--perceptual", "none", "--precision", "fp32",
        "--num-workers", "0", "--num-validation-images", "4", "--num-statistics-images", "6", "--device", "cpu",
    ]  # fmt: skip


def run(count: int, *args: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    launcher = (sys.executable,) if count == 1 else (*TORCHRUN, str(count))
    return subprocess.run(
        [*launcher, *args], check=check, capture_output=True, text=True, timeout=300, env=ENVIRONMENT | variables
    )


def start(count: int, *args: str, said: Path | None = None) -> list[subprocess.Popen]:
    """Start processes as a scheduler does, without a launcher that would end one for another.

    What they say goes into the file `said`, or where `communicate` reads it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as files:
        stdout, stderr = subprocess.PIPE, subprocess.PIPE
        if said is not None:
            stdout, stderr = subprocess.DEVNULL, files.enter_context(said.open("w"))
        return [
            subprocess.Popen(
                [sys.executable, *args], stdout=stdout, stderr=stderr, text=True,
                env=ENVIRONMENT | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": str(port)},
            ) for rank in range(count)
        ]  # fmt: skip


def losses(out: Path) -> list[dict]:
    clocks = ("images_per_sec", "training_sec", "kind")
    return [
        {name: value for name, value in record.items() if name not in clocks}
        for record in read_journal(out)
        if record["kind"] == "train"
    ]


def assert_same(out: Path, expected: Path) -> None:
    ours, theirs = losses(out), losses(expected)
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        # The adaptive weight and the gradient's norm are quotients and sums of what differs in the last digits.
        loose = {name: other[name] for name in ("adaptive_weight", "gradient_norm", "vf_weight") if name in other}
        assert {name: one[name] for name in loose} == pytest.approx(loose, rel=1e-3, abs=1e-6)
        for name in other.keys() - loose.keys():
            if isinstance(other[name], str):
                assert one[name] == other[name]
            else:
                assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    ours, theirs = read_tensors(out / WEIGHTS)[0], read_tensors(expected / WEIGHTS)[0]
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)
    figures = read_json(expected / "metrics.json")
    found = read_json(out / "metrics.json")
    for name in ("psnr_db", "equivariance_error_scale", "latent_mean", "latent_std", "before_psnr_db", "num_images"):
        assert found[name] == pytest.approx(figures[name], rel=1e-3, abs=1e-3), name
    cards = [read_json(folder / "autoencoder" / "eqvae.json") for folder in (out, expected)]
    assert cards[0]["latent_std"] == pytest.approx(cards[1]["latent_std"], rel=1e-3)


@pytest.mark.parametrize("kind", [KL, ACCUMULATING, VQ, METHODS], ids=["adversary", "accumulation", "codes", "methods"])
def test_two_processes_are_one(tmp_path, photographs, kind):
    run(1, *arguments(photographs, tmp_path / "one", *kind))
    done = run(2, *arguments(photographs, tmp_path / "two", *kind))
    assert_same(tmp_path / "two", tmp_path / "one")
    assert read_json(tmp_path / "one" / "environment.json")["num_processes"] == 1
    assert read_json(tmp_path / "two" / "environment.json")["num_processes"] == 2
    assert done.stdout.count("equivariance error") == 1
    assert done.stderr.count("finetune: 4/4 steps") == 1


STOPPED = """
import os, signal, sys
import eqvae.runs.finetune_run as loop
from eqvae.cli import run

def step(state, *rest):
    record = real(state, *rest)
    if state.step == int(os.environ["STOP_AT"]) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return record

real, loop.train_step = loop.train_step, step
sys.exit(run(sys.argv[1:]))
"""


def test_resumed_with_another_number(tmp_path, photographs):
    kind = ("untrained:tiny-kl", "--adversarial-weight", "0", "--image-size", "64")
    run(1, *arguments(photographs, tmp_path / "one", *kind))
    (tmp_path / "stopped.py").write_text(STOPPED)
    args = arguments(photographs, tmp_path / "run", *kind)
    for step, count in ((1, 1), (2, 2), (3, 4)):
        stopped = run(count, str(tmp_path / "stopped.py"), *args[2:], check=False, STOP_AT=str(step))
        assert f"interrupted, SIGTERM at step {step}" in stopped.stderr
        assert len(losses(tmp_path / "run")) == step
        assert read_json(tmp_path / "run" / "environment.json")["num_processes"] == count
    run(2, *args)
    assert_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_ends_all(tmp_path, photographs, number, rank):
    endless = [*arguments(photographs, tmp_path / "run", "untrained:tiny-kl", "--image-size", "64")]
    endless[endless.index("--max-steps") + 1] = "100000"
    processes = start(2, *endless, "--adversarial-weight", "0", "--checkpoint-every", "5", "--validate-every", "100000")
    try:
        deadline_sec = time.monotonic() + 120
        while len(losses(tmp_path / "run")) < 6:
            assert all(process.poll() is None for process in processes), [each.communicate() for each in processes]
            assert time.monotonic() < deadline_sec
            time.sleep(0.1)
        processes[rank].send_signal(number)
        began_sec = time.monotonic()
        said = [process.communicate(timeout=30)[1] for process in processes]
        assert time.monotonic() - began_sec < 15
    finally:
        for process in processes:
            process.kill()
    lines = [line for text in said for line in text.splitlines() if line.startswith("eqvae:")]
    assert len(lines) == 1, said
    assert "Traceback" not in "".join(said)
    codes = [process.returncode for process in processes]
    if number == signal.SIGTERM:
        assert codes == [130, 130]
        assert "interrupted, SIGTERM at step" in lines[0]
        numbers = read_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["numbers"]
        assert f'"step": {len(losses(tmp_path / "run"))}' in numbers
    else:
        assert codes[1 - rank] == 130
        assert codes[rank] == -signal.SIGKILL
        assert "another process" in lines[0]


def test_a_batch_that_cannot_be_split(tmp_path, photographs):
    args = arguments(photographs, tmp_path / "run", "untrained:tiny-kl", "--image-size", "64")
    args[args.index("--batch-size") + 1] = "5"
    processes = start(2, *args)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    line = "eqvae: --batch-size 5 can't be split over 2 processes and 1 equal parts. Choose a multiple of 2"
    assert line in said[0]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_ends_all_of_an_evaluation(tmp_path, number, rank):
    images = tmp_path / "images"
    images.mkdir()
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    for index in range(2000):
        picture.save(images / f"{index:04d}.png")
    said = tmp_path / "said"
    processes = start(
        2, "-u", "-m", "eqvae", "evaluate", "untrained:tiny-kl", "--data", str(images), "--out", str(tmp_path / "out"),
        "--image-size", "64", "--batch-size", "2", "--num-workers", "0", "--device", "cpu", said=said,
    )  # fmt: skip
    try:
        deadline_sec = time.monotonic() + 120
        while "evaluate: " not in said.read_text():
            assert all(process.poll() is None for process in processes), said.read_text()
            assert time.monotonic() < deadline_sec
            time.sleep(0.1)
        processes[rank].send_signal(number)
        began_sec = time.monotonic()
        for process in processes:
            process.wait(timeout=30)
        assert time.monotonic() - began_sec < 15
    finally:
        for process in processes:
            process.kill()
    lines = [line for line in said.read_text().splitlines() if line.startswith("eqvae:")]
    assert len(lines) == 1, said.read_text()
    assert "Traceback" not in said.read_text()
    assert "the same command measures anew" in lines[0]
    codes = [process.returncode for process in processes]
    assert codes == [130, 130] if number == signal.SIGTERM else codes[1 - rank] == 130
    assert not (tmp_path / "out").exists()
