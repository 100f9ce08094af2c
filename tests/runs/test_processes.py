"""Fine-tuning and evaluation on several processes: one process's results, any number resumes, all end together."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from eqvae.artifacts.files import read_journal, read_json, read_tensors

pytestmark = pytest.mark.slow

WEIGHTS = "autoencoder/diffusion_pytorch_model.safetensors"

# At a low rate: Adam's first steps of the discriminator blow up what differs in the last digits.
KL = ("untrained:tiny-kl", "--discriminator-warmup-steps", "1", "--image-size", "128", "--learning-rate", "1e-6")
ACCUMULATING = ("untrained:tiny-kl", "--adversarial-weight", "0", "--gradient-accumulation-steps", "2",
                "--image-size", "64", "--max-grad-norm", "0.01")  # fmt: skip
VQ = ("untrained:tiny-vq", "--codebook", "ema", "--restart-dead-codes", "2", "--adversarial-weight", "0",
      "--image-size", "64")  # fmt: skip
METHODS = ("untrained:tiny-kl", "--method", "photometric:0.5 + detok:0.25 + lmr:0.25 + vf", "--adversarial-weight", "0",
           "--image-size", "64")  # fmt: skip


def arguments(photographs: Path, out: Path, *more: str) -> list[str]:
    data = ("--data", str(photographs), "--validation-data", str(photographs), "--out", str(out))
    return [
        "finetune", "--learning-rate", "1e-4", *more, *data, "--max-steps", "4", "--batch-size", "4",
        "--log-every", "1", "--lr-warmup-steps", "1", "--perceptual", "none", "--precision", "fp32",
        "--num-workers", "0", "--num-validation-images", "4", "--num-statistics-images", "6", "--device", "cpu",
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
def test_two_processes_are_one(forks, tmp_path, photographs, kind):
    forks.run(1, arguments(photographs, tmp_path / "one", *kind))
    said = forks.run(2, arguments(photographs, tmp_path / "two", *kind)).said
    assert_same(tmp_path / "two", tmp_path / "one")
    assert read_json(tmp_path / "one" / "environment.json")["num_processes"] == 1
    assert read_json(tmp_path / "two" / "environment.json")["num_processes"] == 2
    assert sum(line.startswith("equivariance error") for line in said.splitlines()) == 1
    assert said.count("finetune: 4/4 steps") == 1


def test_resumed_with_another_number(forks, tmp_path, photographs):
    kind = ("untrained:tiny-kl", "--adversarial-weight", "0", "--image-size", "64")
    forks.run(1, arguments(photographs, tmp_path / "one", *kind))
    args = arguments(photographs, tmp_path / "run", *kind)
    for step, count in ((1, 1), (2, 2), (3, 4)):
        assert f"interrupted, SIGTERM at step {step}" in forks.run(count, args, stop_at=step).said
        assert len(losses(tmp_path / "run")) == step
        assert read_json(tmp_path / "run" / "environment.json")["num_processes"] == count
    forks.run(2, args)
    assert_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_ends_all(forks, tmp_path, photographs, number, rank):
    endless = [*arguments(photographs, tmp_path / "run", "untrained:tiny-kl", "--image-size", "64")]
    endless[endless.index("--max-steps") + 1] = "100000"
    more = ("--adversarial-weight", "0", "--checkpoint-every", "5", "--validate-every", "100000")
    outcome = send(forks, (*endless, *more), lambda said: len(losses(tmp_path / "run")) >= 6, number, rank)
    if number == signal.SIGTERM:
        assert outcome.codes == [130, 130]
        assert "interrupted, SIGTERM at step" in outcome.lines[0]
        numbers = read_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["numbers"]
        assert f'"step": {len(losses(tmp_path / "run"))}' in numbers
    else:
        assert outcome.codes[1 - rank] == 130
        assert outcome.codes[rank] == -signal.SIGKILL
        assert "another process" in outcome.lines[0]


def send(forks, args, under_way, number, rank):
    """Send one of two processes a signal once they are under way; both end soon, and say it in one line."""
    job, began_sec = forks.start(2, args), time.monotonic()
    while not under_way(job.said):
        assert time.monotonic() < began_sec + 120, job.said
        time.sleep(0.1)
    os.kill(job.numbers[rank], number)
    sent_sec = time.monotonic()
    outcome = job.end()
    assert time.monotonic() - sent_sec < 15
    assert len(outcome.lines) == 1, outcome.said
    assert "Traceback" not in outcome.said
    return outcome


def test_a_batch_that_cannot_be_split(forks, tmp_path, photographs):
    args = arguments(photographs, tmp_path / "run", "untrained:tiny-kl", "--image-size", "64")
    args[args.index("--batch-size") + 1] = "5"
    outcome = forks.start(2, args).end()
    assert outcome.codes == [2, 2]
    line = "eqvae: --batch-size 5 can't be split over 2 processes and 1 equal parts. Choose a multiple of 2"
    assert line in outcome.lines
    assert "Traceback" not in outcome.said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_ends_all_of_an_evaluation(forks, tmp_path, number, rank):
    images = tmp_path / "images"
    images.mkdir()
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    for index in range(2000):
        picture.save(images / f"{index:04d}.png")
    args = (
        "evaluate", "untrained:tiny-kl", "--data", str(images), "--out", str(tmp_path / "out"),
        "--image-size", "64", "--batch-size", "2", "--num-workers", "0", "--device", "cpu",
    )  # fmt: skip
    outcome = send(forks, args, lambda said: "evaluate: " in said, number, rank)
    assert "the same command measures anew" in outcome.lines[0]
    assert outcome.codes == [130, 130] if number == signal.SIGTERM else outcome.codes[1 - rank] == 130
    assert not (tmp_path / "out").exists()
