"""Sampling from trained runs: the right weights, the right decoder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eqvae.errors import Interrupted, UserError
from eqvae.runs.sample import SampleConfig, sample
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig


@pytest.fixture
def run(configure) -> TrainConfig:
    """A finished run of four steps with snapshots."""
    config = configure(posthoc_ema=True, sample_every=2, learning_rate=0.01)
    train(config)
    return config


@pytest.fixture
def draw(tmp_path: Path, run: TrainConfig) -> Callable[..., np.ndarray]:
    """Samples and returns the images of the archive."""

    def make(name: str, **options: object) -> np.ndarray:
        settings = {"num_samples": 6, "num_steps": 3, "batch_size": 4, "precision": "fp32", "device": "cpu"}
        sample(SampleConfig(run=str(run.out), out=tmp_path / name, **settings | options))
        with np.load(tmp_path / name / "samples.npz", allow_pickle=False) as archive:
            return archive["arr_0"]

    return make


def test_batches_and_weights(draw, run):
    images = draw("one")
    assert (images.shape, images.dtype) == ((6, 64, 64, 3), np.uint8)
    assert np.abs(images.astype(int) - draw("other", batch_size=1).astype(int)).max() <= 1
    assert np.array_equal(images, draw("again", guidance_scale=1.0))
    assert not np.array_equal(images, draw("model", weights="model"))
    assert not np.array_equal(images, draw("seed", seed=1))


def test_horizons_after_training(draw):
    short, long = draw("short", sigma_rel=0.05), draw("long", sigma_rel=0.15)
    assert not np.array_equal(short, long)
    with pytest.raises(UserError, match=r"--sigma-rel.*0.05 and 0.1 are usual"):
        draw("refused", sigma_rel=0.5)


def test_autoguidance_by_another_run(draw, configure):
    weak = configure("weak", max_steps=1)
    train(weak)
    assert not np.array_equal(draw("guided", weak_run=weak.out, guidance_scale=2.0), draw("plain"))
    sit = configure("sit", max_steps=1, recipe="sit-ti-4")
    train(sit)
    with pytest.raises(UserError, match="--weak-run is a 'sit-ti-4'"):
        draw("refused", weak_run=sit.out, guidance_scale=2.0)


def test_a_run_that_is_not_finished(configure, monkeypatch, tmp_path):
    config = configure("unfinished", sample_every=1, max_steps=5)

    def stop(*arguments: object) -> None:
        raise Interrupted("as if by a signal")

    with monkeypatch.context() as context, pytest.raises(Interrupted):
        context.setattr("eqvae.runs.train.Run._finish", stop)
        train(config)
    assert (
        sample(SampleConfig(run=str(config.out), out=tmp_path / "drawn", num_samples=2, num_steps=2, device="cpu"))[
            "num_samples"
        ]
        == 2
    )


def test_what_does_not_fit(draw, run, tmp_path):
    def fails(what: str, **options: object) -> None:
        with pytest.raises(UserError, match=what):
            draw("refused", **options)
        assert not (tmp_path / "refused").exists()

    fails("models latents of 'untrained:tiny-kl'.*--autoencoder", autoencoder="untrained:tiny-kl-f2")
    fails("--sampler euler is not for 'dit-ti-4'", sampler="euler")
    draw("here")
    with pytest.raises(UserError, match="--guidance-scale 1.0, not 2.0"):
        draw("here", guidance_scale=2.0)


def test_no_snapshots(configure, tmp_path):
    config = configure("plain", max_steps=1)
    train(config)
    with pytest.raises(UserError, match="no snapshots.*--posthoc-ema"):
        sample(SampleConfig(run=str(config.out), out=tmp_path / "out", sigma_rel=0.1, device="cpu"))


def test_unconditional(configure, unlabelled_latents, tmp_path):
    config = configure("plain", latents=unlabelled_latents, flip=False, max_steps=1)
    train(config)
    options = SampleConfig(run=str(config.out), out=tmp_path / "out", num_samples=3, num_steps=2, device="cpu")
    with pytest.raises(UserError, match="nothing to guide by"):
        sample(replace(options, guidance_scale=2.0))
    sample(options)
    with np.load(options.out / "samples.npz", allow_pickle=False) as archive:
        assert {name: archive[name].shape for name in archive} == {"arr_0": (3, 64, 64, 3)}
