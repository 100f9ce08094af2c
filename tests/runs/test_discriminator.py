"""A run's discriminator: exported beside the autoencoder, loaded by the next run, regularized, on frozen features."""

from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_json, read_tensors, write_json
from eqvae.artifacts.names import CHECKPOINT
from eqvae.errors import UserError
from eqvae.losses.discriminator_files import load_discriminator, save_discriminator
from eqvae.losses.discriminators import PatchDiscriminator
from eqvae.runs.finetune import FinetuneConfig, finetune, plan
from eqvae.runtime.run_folder import from_flat
from interruptions import interrupt, train_records


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs of 64 px."""
    from eqvae.images import open_images

    folder, source = tmp_path_factory.mktemp("pictures"), open_images("photos")
    for index in range(4):
        source.read(index).resize((64, 64)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small PatchGAN under LDM's names."""
    path, discriminator = tmp_path_factory.mktemp("ldm") / "last.ckpt", PatchDiscriminator(width=8, num_layers=2)
    discriminator(torch.rand(2, 3, 32, 32))
    state = {f"loss.discriminator.main.{name}": value for name, value in discriminator.state_dict().items()}
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture
def configure(pictures: Path, tmp_path: Path):
    """A function that makes the configuration of a run of a second."""

    def make(out: str = "run", **changes) -> FinetuneConfig:
        defaults = {
            "autoencoder": "small", "data": str(pictures), "validation_data": str(pictures), "out": tmp_path / out,
            "max_steps": 4, "image_size": 64, "batch_size": 2, "learning_rate": 1e-3, "transforms": "rotation",
            "perceptual": "none", "precision": "fp32", "num_workers": 0, "log_every": 1, "num_validation_images": 1,
            "num_statistics_images": 2, "validate_every": 100, "ema_decay": 0.0,
        }  # fmt: skip
        return from_flat(FinetuneConfig, **defaults | changes)

    return make


KINDS = {
    "loaded": {},
    "r1": {"discriminator_regularization": "r1"},
    "lecam": {"discriminator_regularization": "lecam", "discriminator_regularization_weight": 0.1},
    "features": {"discriminator_features": "efficientnet-lite0", "discriminator_warmup_steps": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_resumes_bit_for_bit_and_is_exported(configure, small_autoencoder, learnt, kind):
    new, changes = type(small_autoencoder), KINDS[kind]
    if kind != "features":
        changes = changes | {"discriminator": str(learnt)}
    whole, halves = configure("whole", **changes), configure("halves", **changes)
    finetune(whole, new())
    interrupt(halves, new(), 2)
    finetune(halves, new())
    records = train_records(whole.out)
    assert train_records(halves.out) == records
    (one, _), (other, _) = (read_tensors(config.out / CHECKPOINT) for config in (whole, halves))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []

    assert len(records) == 4
    assert (records[0]["learning_rate"] > 0) == (kind != "features")  # what has learnt already is not warmed up
    assert ({"discriminator_r1", "discriminator_lecam"} & set(records[-1])) == {f"discriminator_{kind}"} - {
        "discriminator_loaded", "discriminator_features"
    }  # fmt: skip
    assert any(name.startswith("logit_averages.") for name in one) == (kind == "lecam")
    exported = load_discriminator(str(whole.out)).learned.state_dict()
    kept = {name: value for name, value in one.items() if name.startswith("discriminator.")}
    assert {f"discriminator.{name}" for name in exported} == set(kept)  # a frozen network's weights are not among them
    assert all(torch.equal(value, kept[f"discriminator.{name}"]) for name, value in exported.items())


def test_where_it_began_stands_in_config_and_card(configure, small_autoencoder, learnt, capsys, tmp_path):
    new = type(small_autoencoder)
    finetune(configure("first", discriminator=str(learnt)), new())
    first = configure("first").out
    began, config = load_discriminator(str(learnt)), read_json(first / "config.json")
    assert (config["discriminator"], config["discriminator_warmup_steps"]) == (str(learnt), 0)
    assert config["discriminator_fingerprint"] == began.fingerprint()
    exported = read_json(first / "autoencoder" / "discriminator" / "config.json")
    assert exported["fingerprint"] != began.fingerprint()
    card = read_json(first / "autoencoder" / "eqvae.json")
    assert card["recipe"] == {
        key: value
        for key, value in config.items()
        if key not in ("command", "base_fingerprint", "num_data", "num_validation_data")
    }  # fmt: skip
    second = configure("second", discriminator=str(first), max_steps=2)
    interrupt(second, new(), 1)
    assert f"'{first}/autoencoder/discriminator'" in capsys.readouterr().err
    assert read_json(second.out / "config.json")["discriminator_fingerprint"] == exported["fingerprint"]
    # Its first step's checkpoint is of the second run: what it began from is exchanged before it goes on.
    save_discriminator(PatchDiscriminator(width=8, num_layers=2), first / "autoencoder" / "discriminator")
    with pytest.raises(UserError, match="began from another discriminator than"):
        finetune(second, new())
    unfinished = configure("third", discriminator=str(second.out), max_steps=1)
    assert finetune(unfinished, new())["num_steps"] == 1  # out of its checkpoint


def test_an_older_runs_folder_resumes(configure, small_autoencoder):
    new, config = type(small_autoencoder), configure(adversarial_weight=0.0)
    interrupt(config, new(), 2)
    saved = read_json(config.out / "config.json")
    added = {name for name in saved if name.startswith("discriminator") and name != "discriminator_warmup_steps"}
    assert len(added) == 5
    write_json(config.out / "config.json", {name: value for name, value in saved.items() if name not in added})
    assert finetune(config, new())["num_steps"] == 4


@pytest.mark.slow
def test_the_plan_knows_the_heads(configure, small_autoencoder):
    config = configure(discriminator_features="efficientnet-lite0", discriminator_regularization="lecam")
    planned = plan(config, small_autoencoder)
    assert "memory_unknown" not in planned
    assert planned["config"]["discriminator_features"] == "efficientnet-lite0"
    assert planned["memory_gib_step"] > 0


def test_pictures_that_become_too_small_for_the_heads_are_refused(configure, small_autoencoder):
    config = configure(discriminator_features="efficientnet-lite0", transforms="paper")
    with pytest.raises(UserError, match="too small for the discriminator.*32 px are left"):
        finetune(config, small_autoencoder)
    assert not config.out.exists()
