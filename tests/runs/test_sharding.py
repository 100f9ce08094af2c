"""`eqvae train --shard`: weights shared out among processes give what one process gives, and its files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_journal, read_tensors
from eqvae.cli import run

FLAGS = (
    "--batch-size", 4, "--log-every", 1, "--watch-steps", 2, "--sample-every", 100, "--num-watch-samples", 4,
    "--device", "cpu", "--ema-decay", 0.5, "--gradient-accumulation-steps", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def train(forks, eight_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains on a number of processes, up to a step."""
    folder = tmp_path_factory.mktemp("sharding")

    def train(count: int, max_steps: int, out: str, recipe: str, *more: object) -> Path:
        autoencoder = "untrained:tiny-vq" if recipe.startswith("maskgit") else "untrained:tiny-kl"
        cache = folder / autoencoder.removeprefix("untrained:")
        if not cache.exists():
            encode = ["encode", autoencoder, "--data", eight_images, "--out", cache, "--image-size", 64]
            forks.run(1, [*encode, "--num-workers", 0, "--device", "cpu"])
        forks.run(count, ["train", recipe, "--latents", cache, "--out", folder / out, "--max-steps", max_steps,
                          *FLAGS, *more])  # fmt: skip
        return folder / out

    return train


def losses(out: Path, *names: str) -> torch.Tensor:
    return torch.tensor([[record[n] for n in names] for record in read_journal(out) if record["kind"] == "train"])


def assert_same_files(out: Path, expected: Path, **tolerance: float) -> None:
    names = ["checkpoint", "generator/ema", "generator/model"]
    names += [str(path.relative_to(expected)).removesuffix(".safetensors") for path in expected.glob("snapshots/*")]
    for name in names:
        ours, theirs = (read_tensors(folder / f"{name}.safetensors")[0] for folder in (out, expected))
        assert [(key, each.shape, each.dtype) for key, each in ours.items()] == [
            (key, each.shape, each.dtype) for key, each in theirs.items()
        ]
        for key in ours if tolerance else ():
            torch.testing.assert_close(ours[key], theirs[key], msg=f"{name}: {key}", **tolerance)


@pytest.mark.slow
def test_shards_are_one_run_which_any_number_resumes(train):
    more = ("dit-ti-4", "--precision", "fp32", "--max-grad-norm", 0.5, "--posthoc-ema", "--learning-rate", 1e-3)
    one = train(1, 4, "one", *more)
    for count, step, flags in ((2, 2, ("--shard",)), (1, 3, ()), (2, 4, ("--shard", "--gradient-checkpointing"))):
        shards = train(count, step, "shards", *more, *flags)
    figures = losses(one, "loss", "gradient_norm")
    assert figures.shape == (4, 2)
    assert figures[:, 1].min() > 0.5  # the gradient is clipped
    torch.testing.assert_close(losses(shards, "loss", "gradient_norm"), figures, rtol=1e-5, atol=1e-6)
    assert_same_files(shards, one, rtol=1e-3, atol=1e-3)  # Adam makes a step of the rounding of a tiny gradient


@pytest.mark.slow
def test_shards_of_tokens_in_bf16(train):
    more = ("maskgit-ti", "--precision", "bf16")
    one, shards = train(1, 2, "tokens", *more), train(2, 2, "token-shards", *more, "--shard")
    torch.testing.assert_close(losses(shards, "loss"), losses(one, "loss"), rtol=1e-3, atol=0)
    assert_same_files(shards, one)


def test_one_process_has_nothing_to_share_out(eight_images: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "run")
    assert run(["train", "dit-ti-4", "--latents", str(tmp_path), "--out", out, "--shard", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eqvae: --shard shares weights out among processes, and there is one. Start the command by")
    assert not (tmp_path / "run").exists()
