"""Weights on their way into the package, and those that lie in it."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eqvae.artifacts.files import read_json
from eqvae.artifacts.names import AUTOENCODER, MODEL_CARD
from eqvae.artifacts.records import ModelCard
from eqvae.autoencoders import PRESETS, LatentStatistics, build_autoencoder, load_autoencoder
from eqvae.autoencoders.presets import PACKAGED, PACKAGED_NAMES

MAX_BYTES = 4_800_000
"""Of one model: the package stays small."""

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "results" / "package.py"))


def write_run(folder: Path, preset: str) -> Path:
    """What `eqvae finetune` exports: the model and its card."""
    (folder / AUTOENCODER).mkdir(parents=True)
    autoencoder = build_autoencoder(preset, seed=3)
    channels = autoencoder.latent_channels
    statistics = LatentStatistics(mean=(0.5,) * channels, std=(2.0,) * channels)
    autoencoder.set_latent_statistics(statistics)
    autoencoder.save(folder / AUTOENCODER)
    ModelCard(
        base=f"untrained:{preset}", base_fingerprint="none", fingerprint=autoencoder.fingerprint(),
        data="/a/machine/of/ours/train", num_steps=1, latent_mean=statistics.mean, latent_std=statistics.std,
        recipe={"data": "/a/machine/of/ours/train", "out": "runs/new", "max_steps": 1}, figures={"psnr_db": 20.0},
        eqvae_version="0",
    ).write(folder / AUTOENCODER)  # fmt: skip
    return folder


@pytest.mark.parametrize("preset", PACKAGED_NAMES)
def test_a_runs_model_becomes_a_presets_weights(tmp_path, preset):
    run = write_run(tmp_path / "run", preset)
    folder = SCRIPT["package"](preset, run, tmp_path / "weights")
    assert folder == tmp_path / "weights" / preset
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_BYTES
    full, half = load_autoencoder(str(run)), load_autoencoder(str(folder))
    for (name, value), (other_name, rounded) in zip(full.state_dict().items(), half.state_dict().items(), strict=True):
        assert (name, rounded.dtype) == (other_name, torch.float32)
        assert torch.equal(rounded, value.half().float())
    configs = [read_json(place / "config.json") for place in (run / AUTOENCODER, folder)]
    assert configs[0] == configs[1]
    assert configs[0]["scaling_factor"] != 1.0
    card = read_json(folder / MODEL_CARD)
    assert card["fingerprint"] == half.fingerprint()
    assert (card["data"], card["recipe"]["data"], card["recipe"]["out"]) == ("train", "train", "runs/new")


def test_half_precision_is_measured(tmp_path):
    run = write_run(tmp_path / "run", "tiny-vq")
    said = SCRIPT["compare"](load_autoencoder(str(run)), load_autoencoder(str(run)), 32)
    assert "latents move by 0.000% of their deviation, 100.00% of the tokens stay" in said


def test_another_architecture_is_refused(tmp_path):
    run = write_run(tmp_path / "run", "tiny-vq")
    with pytest.raises(SystemExit, match="another architecture than 'tiny-kl'"):
        SCRIPT["package"]("tiny-kl", run, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("name", PACKAGED_NAMES)
def test_packaged_weights_are_their_presets(name):
    assert sorted(path.name for path in PACKAGED.iterdir()) == sorted(PACKAGED_NAMES)
    preset = PRESETS[name]
    assert preset.packaged == PACKAGED / name
    assert sum(path.stat().st_size for path in preset.packaged.iterdir()) < MAX_BYTES
    autoencoder, untrained = load_autoencoder(name), build_autoencoder(name, seed=0)
    assert {key: value.shape for key, value in autoencoder.state_dict().items()} == {
        key: value.shape for key, value in untrained.state_dict().items()
    }
    card = read_json(preset.packaged / MODEL_CARD)
    assert card["fingerprint"] == autoencoder.fingerprint() != untrained.fingerprint()
    assert card["num_steps"] > 0
    assert not any(isinstance(value, str) and Path(value).is_absolute() for value in card["recipe"].values())
