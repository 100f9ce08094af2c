"""Training from a cache: every family learns, runs resume, and what does not fit together is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eqvae.artifacts.files import read_journal, read_json, read_tensors, write_json
from eqvae.artifacts.names import CHECKPOINT
from eqvae.autoencoders import load_autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import load_transformer, read_generator
from eqvae.generators.families import find_recipe
from eqvae.images.image_sets import open_reference
from eqvae.latents.cache import LatentCache
from eqvae.metrics.statistics import compute_statistics
from eqvae.networks.features import load_features
from eqvae.runs.sample import SampleConfig, sample
from eqvae.runs.train import train
from eqvae.runs.train_config import make_plan
from eqvae.runs.train_cost import describe_plan, state_bytes
from eqvae.runtime.processes import Processes

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


def losses(out: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in read_journal(out) if record["kind"] == "train"]


PROCESSES = [
    ("linear", "velocity", "none"), ("gvp", "velocity", "none"), ("vp", "velocity", "none"),
    ("linear", "noise", "none"), ("gvp", "noise", "velocity"), ("vp", "noise", "none"), ("linear", "score", "none"),
    ("vp", "score", "likelihood"), ("gvp", "score", "none"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "prediction", "loss_weight"), PROCESSES)
def test_every_process_of_sit_trains_and_is_sampled(configure, path, prediction, loss_weight):
    config = configure(
        recipe="sit-ti-8", path=path, prediction=prediction, loss_weight=loss_weight, max_steps=2, log_every=2
    )
    figures = train(config)
    assert figures["num_steps"] == 2
    assert torch.tensor(losses(config.out)).isfinite().all()
    interpolant = read_generator(config.out).card.interpolant
    assert (interpolant.path, interpolant.prediction, interpolant.time_of_data) == (path, prediction, 1)
    assert (config.out / "samples" / "step_0000002.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dit-ti-4", "sit-ti-4"])
def test_the_loss_falls_on_what_is_easy_to_learn(configure, recipe):
    # The means of an untrained encoder are two patterns, one for each class; its samples are little but noise.
    config = configure(
        recipe=recipe, max_steps=40, batch_size=16, num_watch_samples=2, posterior="mean", normalization="fixed:3"
    )
    train(config)
    found = losses(config.out, "mse")
    assert sum(found[-8:]) < 0.85 * sum(found[:8])


def test_bf16(configure):
    config = configure(precision="bf16", max_steps=1)
    train(config)
    assert 0.5 < losses(config.out)[0] < 2.0


def test_the_watch_draws_by_the_sampler_that_is_asked_for(configure, tmp_path):
    config = configure(recipe="sit-ti-8", watch_sampler="heun", watch_steps=3, num_watch_samples=2, max_steps=1)
    train(config)
    drawing = SampleConfig(run=str(config.out), out=tmp_path, num_samples=2, num_steps=3, precision="fp32")
    sample(replace(drawing, sampler="heun", out=tmp_path / "heun"))
    sample(replace(drawing, out=tmp_path / "published"))
    sheet = (config.out / "samples" / "step_0000001.png").read_bytes()
    assert sheet == (tmp_path / "heun" / "samples.png").read_bytes()
    assert sheet != (tmp_path / "published" / "samples.png").read_bytes()


def test_an_unlabelled_cache_trains_unconditionally(configure, unlabelled_latents):
    for command in (train, describe_plan):
        with pytest.raises(UserError, match="no mirror images.*--no-flip"):
            command(configure("plain", latents=unlabelled_latents))
    assert not configure("plain").out.exists()
    config = configure("plain", latents=unlabelled_latents, flip=False)  # as advised
    train(config)
    generator = read_generator(config.out)
    assert generator.card.transformer.latents.num_classes == 0
    assert generator.transformer.y_embedder is None


def test_the_export_loads_under_the_published_names(configure, latents):
    config = configure(max_steps=2)
    train(config)
    card = read_generator(config.out).card
    cache = LatentCache.open(latents)
    assert (card.recipe, card.image_size_px, card.class_names, card.num_steps) == ("dit-ti-4", 64, ("a", "b"), 2)
    assert (card.autoencoder, card.autoencoder_fingerprint) == ("untrained:tiny-kl", cache.index.fingerprint)
    z = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(card.denormalize(cache.normalization.normalize(z)), z, rtol=1e-4, atol=1e-5)
    state = read_tensors(config.out / "generator" / "ema.safetensors")[0]
    spec = card.transformer.latents
    load_transformer(find_recipe("dit-ti-4").transformer(spec), state, source="export")
    tensors = read_tensors(config.out / CHECKPOINT)[0]
    assert all(torch.equal(tensors[f"ema.{name}"], value) for name, value in state.items())


def test_a_decoder_that_was_trained_further_draws_the_pictures(configure, latents, data, tmp_path, capsys):
    """What binds latents and a generator is the encoder; the run says that the decoder is another."""
    polished = load_autoencoder("untrained:tiny-kl")
    with torch.no_grad():
        polished.last_layer.bias += 0.5
    (tmp_path / "polished").mkdir()
    polished.save(tmp_path / "polished")
    config = configure(max_steps=2, autoencoder=str(tmp_path / "polished"))
    train(config)
    assert "trained further than that of 'untrained:tiny-kl'" in capsys.readouterr().err
    card = read_generator(config.out).card
    assert card.autoencoder_fingerprint == polished.fingerprint() != LatentCache.open(latents).index.fingerprint
    with pytest.raises(UserError, match="another decoder"):
        train(replace(config, max_steps=3, autoencoder=None))
    drawing = SampleConfig(run=str(config.out), out=tmp_path / "samples", num_samples=2, num_steps=2)
    sample(drawing)
    assert "trained further" not in capsys.readouterr().err
    with pytest.raises(UserError, match="samples of another decoder"):
        sample(replace(drawing, autoencoder="untrained:tiny-kl"))
    sample(replace(drawing, autoencoder="untrained:tiny-kl", out=tmp_path / "other"))
    assert "trained further" in capsys.readouterr().err
    first, other = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("samples", "other"))
    assert not np.array_equal(first, other)


def test_fixed_normalization_and_posterior_means(configure):
    config = configure(normalization="fixed:0.18215", posterior="mean", flip=False, max_steps=1)
    train(config)
    assert read_generator(config.out).card.scale == pytest.approx((1 / 0.18215,) * 4, rel=1e-5)


def test_resuming_is_exact_and_watched_at_every_stretch(configure, data):
    watched = {"sample_every": 3, "reference": str(data), "max_steps": 5}
    straight = configure("straight", **watched)
    figures = train(straight)
    records = [record for record in read_journal(straight.out) if record["kind"] == "validation"]
    assert [record["step"] for record in records] == [3, 5]
    (found,) = [record for record in read_journal(straight.out) if record["kind"] == "reference"]
    assert found["num_images"] == 12
    assert all(record["training_sec"] > 0 and record["fd_efficientnet_lite0"] > 0 for record in records)
    assert figures["fd_efficientnet_lite0"] == records[-1]["fd_efficientnet_lite0"]
    sheets = sorted(path.name for path in (straight.out / "samples").iterdir())
    assert sheets == ["step_0000003.png", "step_0000005.png"]
    assert train(straight) == figures  # finished: nothing is done
    # A run that lost all after its second step: the checkpoint of that step, and a journal that had gone on.
    broken = configure("broken", **watched)
    shutil.copytree(straight.out, broken.out)
    (broken.out / "metrics.json").unlink()
    shutil.rmtree(broken.out / "generator")
    early = configure("early", **watched | {"max_steps": 2})
    train(early)
    shutil.copy(early.out / CHECKPOINT, broken.out / CHECKPOINT)
    again = train(broken)
    assert again["fd_efficientnet_lite0"] == figures["fd_efficientnet_lite0"]
    assert losses(broken.out) == losses(straight.out)
    one, other = (read_tensors(run.out / CHECKPOINT)[0] for run in (straight, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)

    # A finished run made longer is the long run; a shorter one is refused.
    assert train(configure("early", **watched))["num_steps"] == 5
    longer = read_tensors(early.out / CHECKPOINT)[0]
    assert all(torch.equal(one[name], longer[name]) for name in one)
    with pytest.raises(UserError, match="has taken 5 steps, more than --max-steps 4"):
        train(configure("early", **watched | {"max_steps": 4}))
    (early.out / "metrics.json").unlink()
    before = (early.out / "config.json").read_text()
    with pytest.raises(UserError, match="is at step 5, beyond --max-steps 4"):
        train(configure("early", **watched | {"max_steps": 4}))
    assert (early.out / "config.json").read_text() == before
    with pytest.raises(UserError, match="--keep-last 3 has no place"):
        train(configure("early", **watched | {"keep_last": 3}))


def test_saved_statistics_as_reference(configure, data, tmp_path):
    config = configure(reference=str(data), max_steps=1)
    figures = train(config)
    images = open_reference(str(data), image_size_px=64)
    statistics = compute_statistics(
        load_features("efficientnet-lite0"),
        images,
        indices=range(12),
        device=torch.device("cpu"),
        processes=Processes(rank=0, count=1, device=torch.device("cpu")),
    )
    statistics.save(tmp_path / "saved")
    saved = configure("saved-reference", reference=str(tmp_path / "saved"), max_steps=1)
    assert train(saved)["fd_efficientnet_lite0"] == pytest.approx(figures["fd_efficientnet_lite0"], rel=1e-6)
    other = replace(statistics, provenance=replace(statistics.provenance, features="inception"))
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match="holds features of inception, not of .*. Use --features inception"):
        train(configure("refused", reference=str(tmp_path / "other"), max_steps=1))
    other = replace(statistics, provenance=replace(statistics.provenance, image_size_px=32))
    other.save(tmp_path / "smaller")
    with pytest.raises(UserError, match="is of images of 32 px, the samples have 64 px"):
        train(configure("refused", reference=str(tmp_path / "smaller"), max_steps=1))
    assert not configure("refused").out.exists()


def test_a_longer_run_is_measured_as_before(configure, data, other_data):
    watched = {"reference": str(data), "num_watch_samples": 4, "watch_steps": 2}
    train(configure(**watched, max_steps=1))
    for change, says in (
        ({"watch_steps": 3}, "--watch-steps 2, not 3"),
        ({"num_watch_samples": 6}, "--num-watch-samples 4, not 6"),
        ({"watch_sampler": "ddim"}, "--watch-sampler None, not ddim"),
        ({"reference": str(other_data)}, "measured its samples against other images than those of"),
    ):
        with pytest.raises(UserError, match=says):
            train(configure(**watched | change, max_steps=2))
    assert train(configure(**watched, max_steps=2))["num_steps"] == 2


def test_what_does_not_fit_is_refused_before_anything_is_written(configure, tmp_path, data, odd_latents):
    def fails(what: str, **options: object) -> None:
        with pytest.raises(UserError, match=what):
            train(configure("refused", **options))
        assert not (tmp_path / "refused").exists()

    fails("Did you mean 'dit-ti-4'", recipe="dit-it-4")
    fails("does not exist. Write a latent cache", latents=tmp_path / "nothing")
    fails("is no latent cache", latents=data)
    fails("can't be split over 1 processes and 3 equal parts. Choose a multiple of 3", gradient_accumulation_steps=3)
    fails("normalization", normalization="fixed:x")
    fails("no whole number of patches of 4", recipe="dit-ti-4", latents=odd_latents)
    fails("loss weight 'velocity' is for score or noise", recipe="sit-ti-4", loss_weight="velocity")
    fails("--autoencoder|has other weights", autoencoder="untrained:tiny-kl-f2")
    fails("--repa-depth is 9", recipe="repa-sit-ti-4", repa_depth=9, teacher="efficientnet-lite0")


def test_a_folder_that_holds_something_else(configure, latents):
    config = configure(max_steps=1)
    train(config)
    with pytest.raises(UserError, match="--learning-rate 0.001, not 0.5"):
        train(replace(config, learning_rate=0.5))
    train(replace(config, log_every=7, checkpoint_every=3))
    saved = read_json(config.out / "config.json")
    write_json(config.out / "config.json", saved | {"latents_fingerprint": "another"})
    with pytest.raises(UserError, match="on latents of another autoencoder"):
        train(config)
    with pytest.raises(UserError, match="belongs to 'eqvae encode'"):
        train(replace(config, out=latents))


def test_the_plan_of_a_published_size(configure):
    plan = describe_plan(configure(recipe="dit-xl-2", max_steps=10))
    assert plan["num_parameters"] == pytest.approx(675e6, rel=0.01)
    assert (plan["num_tokens"], plan["num_classes"], plan["num_images"]) == (16, 2, 12)
    assert plan["epochs"] == pytest.approx(10 * 4 / 12)
    assert plan["state_gib"] == pytest.approx(20 * plan["num_parameters"] / 2**30, rel=1e-3)
    assert plan["tflops_total"] == pytest.approx(10 * plan["tflops_per_step"])
    assert plan["config"]["sample_every"] == 100


def test_the_state_is_what_a_checkpoint_and_a_gradient_hold(configure):
    """Averages of any horizon, and adapters, whose frozen weights have neither gradient nor moments."""
    averages = configure("averages", posthoc_ema=True, max_steps=1)
    adapters = configure("adapters", init=averages.out, lora_rank=2, max_steps=1)
    for config in (averages, adapters):
        planned = make_plan(config.resolved(), ALONE)
        train(config)
        tensors, held = read_tensors(config.out / CHECKPOINT)[0], 0
        for key, value in tensors.items():
            held += value.nbytes * (1.5 if key.startswith("optimizer") else 1)  # a gradient for two moments
        assert state_bytes(planned) == pytest.approx(held, rel=2e-3)


@pytest.mark.parametrize("recipe", ["dit-ti-4", "sit-ti-4", "repa-sit-ti-4"])
def test_the_memory_of_every_family_is_worked_out(configure, recipe):
    sampler = {} if recipe == "dit-ti-4" else {"watch_sampler": "heun"}
    teacher = {"teacher": "efficientnet-lite0"} if recipe.startswith("repa") else {}
    plan = describe_plan(configure(recipe=recipe, **sampler, **teacher))
    assert "memory_unknown" not in plan
    assert plan["memory_gib_samples"] > 0.0
