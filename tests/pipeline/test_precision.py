"""bf16 against fp32 on the same data: what half the bits cost each command, within the bounds that the pages state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqvae.artifacts.files import read_journal
from eqvae.artifacts.names import SAMPLE_SET
from eqvae.latents.cache import LatentCache
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runs.evaluate import EvaluateConfig, evaluate
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runs.sample import SampleConfig, sample
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import from_flat

PRECISIONS = ("fp32", "bf16")


def losses(out: Path, name: str) -> torch.Tensor:
    return torch.tensor([record[name] for record in read_journal(out) if record["kind"] == "train"])


def largest_share(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the fp32 figure; 0 would mean that nothing was rounded."""
    share = float(((other - one).abs() / one.abs()).max())
    assert share > 0
    return share


def test_encoding(tmp_path: Path, data: Path):
    latents = []
    for precision in PRECISIONS:
        config = EncodeConfig(
            autoencoder="tiny-kl", data=str(data), out=tmp_path / precision, image_size=64, precision=precision,
            dtype="float32", device="cpu", num_workers=0,
        )  # fmt: skip
        encode(config)
        latents.append(LatentCache.open(config.out).read(torch.arange(12)).latents)
    # Normalized latents: their deviation is about 1.
    assert 0 < (latents[1] - latents[0]).square().mean().sqrt() < 0.01


def test_evaluation(tmp_path: Path, data: Path):
    found: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        config = EvaluateConfig(
            autoencoder="tiny-kl", data=str(data), out=tmp_path / precision, image_size=64, precision=precision,
            num_images=8, device="cpu", num_workers=0, lpips=False,
        )  # fmt: skip
        found.append(evaluate(config))
    full, half = found
    assert half["psnr_db"] == pytest.approx(full["psnr_db"], abs=0.05)
    for name in ("equivariance_error_rotation", "equivariance_error_scale", "latent_std"):
        assert half[name] == pytest.approx(full[name], rel=0.01)
    assert half != full


def test_finetuning(tmp_path: Path, data: Path):
    for precision in PRECISIONS:
        config = from_flat(
            FinetuneConfig, autoencoder="tiny-kl", data=str(data), validation_data=str(data), out=tmp_path / precision,
            image_size=64, max_steps=4, batch_size=2, precision=precision, log_every=1, adversarial_weight=0.0,
            perceptual="none", num_validation_images=2, num_statistics_images=2, device="cpu", num_workers=0,
        )  # fmt: skip
        finetune(config)
    for name in ("reconstruction", "l1", "kl"):
        assert largest_share(*(losses(tmp_path / precision, name) for precision in PRECISIONS)) < 0.01


def test_training_and_sampling(tmp_path: Path, configure: Callable[..., TrainConfig]):
    images = []
    for precision in PRECISIONS:
        train(configure(precision, precision=precision, max_steps=20, learning_rate=3e-3))
        # Both draw from the run of fp32: what is compared is the precision of sampling.
        drawing = SampleConfig(
            run=str(tmp_path / "fp32"), out=tmp_path / f"drawn-{precision}", weights="model", num_samples=4,
            num_steps=10, precision=precision, device="cpu",
        )  # fmt: skip
        sample(drawing)
        with np.load(drawing.out / SAMPLE_SET) as archive:
            images.append(archive["arr_0"].astype(np.float32))
    assert largest_share(*(losses(tmp_path / precision, "loss") for precision in PRECISIONS)) < 0.01
    assert 0 < np.abs(images[1] - images[0]).mean() < 1.0  # of 255
