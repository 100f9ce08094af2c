"""MaskGIT through the same commands as DiT and SiT: train, resume, watch, sample, score."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from eqvae.artifacts.files import read_journal, read_tensors
from eqvae.artifacts.names import CHECKPOINT
from eqvae.cli import run
from eqvae.errors import UserError
from eqvae.generators.checkpoints import read_generator
from eqvae.latents.cache import LatentCache
from eqvae.runs.sample import SampleConfig, sample
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig
from eqvae.runs.train_cost import describe_plan


@pytest.fixture
def configure_maskgit(configure, tokens) -> Callable[..., TrainConfig]:
    """Configures four steps of `maskgit-ti` without warm-up."""

    def make(name: str = "run", **options: object) -> TrainConfig:
        return configure(name, **{"recipe": "maskgit-ti", "latents": tokens, "lr_warmup_steps": 0} | options)

    return make


def losses(config: TrainConfig, name: str = "loss") -> list[float]:
    return [record[name] for record in read_journal(config.out) if record["kind"] == "train"]


@pytest.mark.parametrize("loss_tokens", ["masked", "all"])
def test_the_loss_falls(configure_maskgit, loss_tokens):
    config = configure_maskgit(max_steps=12, loss_tokens=loss_tokens, log_every=1)
    figures = train(config)
    found = losses(config, "cross_entropy")
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert figures["num_parameters"] == read_generator(config.out).transformer.num_parameters()


def test_the_card_says_all_that_sampling_needs(configure_maskgit, tokens):
    config = configure_maskgit(max_steps=1, schedule="square", precision="bf16")
    train(config)
    card, index = read_generator(config.out).card, LatentCache.open(tokens).index
    assert (card.recipe, card.schedule, card.interpolant, card.shift) == ("maskgit-ti", "square", None, ())
    assert card.transformer.latents.shape == (index.codebook_size, 4, 4)
    assert card.autoencoder_fingerprint == index.fingerprint
    assert (config.out / "samples" / "step_0000001.png").is_file()


@pytest.mark.slow
def test_resuming_is_exact_and_watched(configure_maskgit, data):
    settings = {"max_steps": 3, "sample_every": 3, "reference": str(data), "gradient_accumulation_steps": 2}
    straight = configure_maskgit("straight", **settings)
    figures = train(straight)
    assert figures["fd_efficientnet_lite0"] > 0
    assert train(straight) == figures
    early = configure_maskgit("early", **settings | {"max_steps": 2})
    train(early)
    broken = configure_maskgit("broken", **settings)
    shutil.copytree(straight.out, broken.out)
    (broken.out / "metrics.json").unlink()
    shutil.copy(early.out / CHECKPOINT, broken.out / CHECKPOINT)
    again = train(broken)
    assert again["fd_efficientnet_lite0"] == figures["fd_efficientnet_lite0"]
    assert losses(broken) == losses(straight)
    one, other = (read_tensors(each.out / CHECKPOINT)[0] for each in (straight, broken))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_sampling(configure_maskgit, tmp_path):
    config = configure_maskgit(max_steps=2, posthoc_ema=True, sample_every=2, learning_rate=0.01)
    train(config)

    def draw(name: str, **options: object) -> np.ndarray:
        settings = {"num_samples": 6, "batch_size": 4, "precision": "fp32", "device": "cpu"}
        sample(SampleConfig(run=str(config.out), out=tmp_path / name, **settings | options))
        with np.load(tmp_path / name / "samples.npz", allow_pickle=False) as archive:
            assert archive["arr_1"].tolist() == [0, 1] * 3
            return archive["arr_0"]

    images = draw("one")
    assert (images.shape, images.dtype) == ((6, 32, 32, 3), np.uint8)
    assert np.abs(images.astype(int) - draw("other", batch_size=1).astype(int)).max() <= 1
    assert np.array_equal(images, draw("one", num_steps=8))  # the default, so that the folder is the same run's
    assert not np.array_equal(images, draw("halton", sampler="halton", guidance_scale=3.0))
    assert not np.array_equal(images, draw("model", weights="model"))
    assert not np.array_equal(images, draw("horizon", sigma_rel=0.1))
    with pytest.raises(UserError, match="--weak-run .* is not for 'maskgit-ti'. Leave it out"):
        draw("refused", weak_run=config.out, guidance_scale=2.0)
    with pytest.raises(UserError, match="has other weights"):
        draw("refused", autoencoder="untrained:tiny-vq-f4")
    assert not (tmp_path / "refused").exists()


def test_without_classes(configure_maskgit, unlabelled_tokens, tmp_path):
    config = configure_maskgit(latents=unlabelled_tokens, flip=False, max_steps=1)
    train(config)
    options = SampleConfig(run=str(config.out), out=tmp_path / "out", num_samples=2, device="cpu")
    with pytest.raises(UserError, match="nothing to guide by"):
        sample(replace(options, guidance_scale=2.0))
    assert sample(options)["num_samples"] == 2


def test_the_command_line_does_not_notice(tokens, data, tmp_path, capsys):
    flags = ["--device", "cpu", "--precision", "fp32"]
    training = ["--max-steps", "2", "--batch-size", "4", "--num-watch-samples", "4", *flags]
    assert run(["train", "maskgit-ti", "--latents", f"{tokens}", "--out", f"{tmp_path}/run", *training]) == 0
    assert run(["sample", f"{tmp_path}/run", "--out", f"{tmp_path}/drawn", "--num-samples", "6", *flags]) == 0
    capsys.readouterr()
    scoring = ["--reference", f"{data}", "--features", "efficientnet-lite0", "--num-workers", "0", "--device", "cpu"]
    assert run(["score", f"{tmp_path}/drawn/samples.npz", "--out", f"{tmp_path}/score", *scoring]) == 0
    assert "fd_efficientnet_lite0" in capsys.readouterr().out


def test_recipe_and_cache_have_to_fit(configure_maskgit, tokens, latents, tmp_path):
    def fails(what: str, **options: object) -> None:
        with pytest.raises(UserError, match=what):
            train(configure_maskgit("refused", **options))
        assert not (tmp_path / "refused").exists()

    fails("'maskgit-ti' models tokens; .* holds latents. Train a DiT or SiT on it", latents=latents)
    fails("'dit-ti-4' models latents; .* holds tokens. Train a MaskGIT on it", recipe="dit-ti-4")
    fails("--teacher dinov2 is REPA's, and 'maskgit-ti' is no REPA", teacher="dinov2")
    fails("--schedule cosine is MaskGIT's", recipe="sit-ti-4", latents=latents, schedule="cosine")


def test_the_plan_of_a_published_size(configure_maskgit):
    plan = describe_plan(configure_maskgit(recipe="maskgit-b", lr_warmup_steps=None))
    assert plan["num_parameters"] == pytest.approx(173e6, rel=0.02)
    assert (plan["latent_size"], plan["codebook_size"], plan["num_tokens"]) == ([16, 4, 4], 1024, 16)
    # Two operations for each weight of a matrix and token, attention besides.
    assert plan["tflops_per_step"] * 1e12 > 3 * 4 * 2 * 16 * 170e6
    assert plan["config"]["lr_warmup_steps"] == 2500
