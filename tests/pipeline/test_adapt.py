"""A generator goes on with another autoencoder's latents: aligned, in two stretches, by LoRA, resumed bit for bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_journal, read_json, read_tensors, write_json
from eqvae.artifacts.names import CHECKPOINT
from eqvae.autoencoders import load_autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import read_card
from eqvae.latents.cache import LatentCache
from eqvae.runs.adapt import AdaptConfig, adapt, training_config
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runs.sample import SampleConfig, sample
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig
from eqvae.runs.train_cost import describe_plan
from eqvae.runtime.run_folder import from_flat

ENDS = {f"{end}.{part}" for end in ("x_embedder.proj", "final_layer.linear") for part in ("weight", "bias")}


def encoded(folder: Path, data: Path, autoencoder: str, **options: object) -> Path:
    settings = {"image_size": 64, "batch_size": 6, "precision": "fp32", "num_workers": 0, "device": "cpu"}
    encode(EncodeConfig(autoencoder=autoencoder, data=str(data), out=folder, **settings | options))
    return folder


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Latents of the same images by an autoencoder whose channels are those of `latents`, swapped and one negated."""
    folder = tmp_path_factory.mktemp("turned")
    autoencoder = load_autoencoder("untrained:tiny-kl")
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            if name.split(".")[-2] == "quant_conv":  # what the encoder ends in: means, log-variances
                parameter.copy_(parameter[[1, 0, 3, 2, 5, 4, 7, 6]])
    autoencoder.save(folder / "autoencoder")
    return encoded(folder / "cache", data, str(folder / "autoencoder"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    """Four steps of `sit-ti-4` on `latents`."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eqvae.runs.train.matrix_peak_flops_per_sec", lambda device, precision: 1e12)
        settings = {
            "recipe": "sit-ti-4", "latents": latents, "out": out, "max_steps": 4, "batch_size": 4, "log_every": 1,
            "sample_every": 100, "watch_steps": 2, "num_watch_samples": 8, "precision": "fp32", "device": "cpu",
            "learning_rate": 1e-3, "ema_decay": 0.5,
        }  # fmt: skip
        train(from_flat(TrainConfig, **settings))
    return out


@pytest.fixture
def configure(run: Path, turned: Path, tmp_path: Path):
    def make(name: str = "adapted", **options: object) -> AdaptConfig:
        settings = {
            "run": run, "latents": turned, "out": tmp_path / name, "max_steps": 4, "align_steps": 2, "log_every": 1,
            "checkpoint_every": 2, "sample_every": 100, "watch_steps": 2, "num_watch_samples": 8, "device": "cpu",
        }  # fmt: skip
        return AdaptConfig(**settings | options)

    return make


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_journal(out) if record["kind"] == "train"]


def test_swapped_channels_are_the_same_generator(configure, run, turned, latents, capsys):
    """Aligned and not trained, it draws the old latents with their channels swapped."""
    assert LatentCache.open(turned).index.fingerprint != LatentCache.open(latents).index.fingerprint
    adapt(configure(max_steps=1, align_steps=1, learning_rate=1e-12))
    assert "99.9% of the old latents' variance" in capsys.readouterr().err.replace("100.0%", "99.9%")
    old, new = (read_tensors(folder / "generator" / "ema.safetensors")[0] for folder in (run, configure().out))
    assert {name for name in old if not torch.allclose(old[name], new[name], atol=1e-7)} <= ENDS
    first = "x_embedder.proj.weight"
    torch.testing.assert_close(new[first], old[first][:, [1, 0, 3, 2]], rtol=0.02, atol=0.02)


def test_two_stretches(configure, run):
    config = configure()
    figures = adapt(config)
    assert figures["num_steps"] == 4
    saved = read_json(config.out / "config.json")
    assert (saved["command"], saved["recipe"], saved["init"]) == ("train", "sit-ti-4", str(run))
    assert (saved["batch_size"], saved["learning_rate"], saved["ema_decay"]) == (4, 1e-3, 0.5)  # RUN's
    (alignment,) = [record for record in read_journal(config.out) if record["kind"] == "alignment"]
    assert alignment["explained_of_old"] == pytest.approx(1.0, abs=1e-3)
    card = read_card(config.out)
    assert card.autoencoder_fingerprint == LatentCache.open(config.latents).index.fingerprint
    adapt(replace(config, out=config.out.with_name("ends"), max_steps=2))
    before = read_tensors(run / "generator" / "ema.safetensors")[0]
    for out, moved_blocks in ((config.out.with_name("ends"), False), (config.out, True)):
        after = read_tensors(out / "generator" / "model.safetensors")[0]
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved > ENDS if moved_blocks else moved == ENDS
    drawn = config.out.with_name("samples")
    sample(SampleConfig(run=str(config.out), out=drawn, num_samples=2, num_steps=2))
    assert (drawn / "samples.npz").is_file()


@pytest.mark.parametrize("lora_rank", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_resuming_is_exact(configure, lora_rank):
    straight, early = configure("straight", lora_rank=lora_rank), configure("early", lora_rank=lora_rank)
    adapt(straight)
    adapt(replace(early, max_steps=3))
    assert adapt(early)["num_steps"] == 4
    assert losses(early.out) == losses(straight.out)
    one, other = (read_tensors(config.out / CHECKPOINT)[0] for config in (straight, early))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_lora_leaves_names_and_trains_the_blocks_alone(configure, run):
    config = configure(lora_rank=2, align_steps=0, max_steps=2)
    adapt(config)
    before = read_tensors(run / "generator" / "ema.safetensors")[0]
    after = read_tensors(config.out / "generator" / "model.safetensors")[0]
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])} - ENDS
    assert moved  # the products of their adapters
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in moved)
    change = (after["blocks.0.attn.qkv.weight"] - before["blocks.0.attn.qkv.weight"]).double()
    assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2


@pytest.mark.slow
def test_the_plan(configure):
    plan = describe_plan(training_config(configure(lora_rank=4)))
    assert (plan["config"]["lora_rank"], plan["config"]["align_steps"], plan["num_tokens"]) == (4, 2, 4)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    configure, run, data, other_data, latents, tokens, tmp_path
):
    def fails(what: str, **options: object) -> None:
        with pytest.raises(UserError, match=what):
            adapt(configure("refused", **options))
        assert not (tmp_path / "refused").exists()

    fails("holds no trained generator", run=data)
    fails("does not exist. Write a latent cache", latents=tmp_path / "nothing")
    fails("does not exist. Give the cache that .* was trained on", old_latents=tmp_path / "nothing")
    fails("another autoencoder", old_latents=configure().latents)
    fails("of other images", latents=encoded(tmp_path / "other", other_data, "untrained:tiny-kl"))
    fails("can't be cut into the 2 rows", latents=encoded(tmp_path / "odd", data, "untrained:tiny-kl", image_size=56))
    plain = encoded(tmp_path / "plain", data, "untrained:tiny-kl", mirror=False)
    fails("no mirror images. Train with --no-flip", latents=plain)
    adapt(configure("unmirrored", latents=plain, flip=False, max_steps=1, align_steps=1))
    fails("'sit-ti-2' models latents; .* holds tokens|can't be cut", latents=tokens)
    fails("holds tokens", old_latents=tokens)
    fails("--align-images is 0", align_images=0)

    converted = tmp_path / "converted"
    shutil.copytree(run / "generator", converted / "generator")
    fails("does not say which latents", run=converted)
    adapt(configure("fine", run=converted, old_latents=latents, max_steps=1, batch_size=4, precision="fp32"))
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    write_json(damaged / "config.json", read_json(run / "config.json") | {"batch_size": "many"})
    fails("is damaged .batch_size is 'many', no int", run=damaged)


def test_flags_of_a_start_need_one(latents, tmp_path):
    def fails(what: str, recipe: str = "dit-ti-4", **options: object) -> None:
        with pytest.raises(UserError, match=what):
            train(from_flat(TrainConfig, recipe=recipe, latents=latents, out=tmp_path / "refused", **options))

    fails("--align-steps is for a run that begins from another. Name that one by --init", align_steps=3)
    fails("--lora-rank is not for 'maskgit-ti': codes", "maskgit-ti", init=latents, lora_rank=3)
    fails("--old-latents is not for 'gat-ti-4': its discriminator", "gat-ti-4", init=latents, old_latents=latents)
    fails("--align-images is of --old-latents", init=latents, align_images=3)
    fails("--shard is not for --lora-rank", init=latents, lora_rank=3, shard=True)
