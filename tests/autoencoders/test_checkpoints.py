"""Autoencoders in the checkpoints and folders that people have, and in those that must be refused."""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.families import KLAutoencoder
from eqvae.autoencoders.layouts import diffusers_to_ldm
from eqvae.autoencoders.presets import PACKAGED
from eqvae.errors import UserError
from eqvae.runtime.journal import say_once

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _say_again() -> None:
    """Let each test hear what is said once in a process."""
    say_once.cache_clear()


@pytest.fixture(scope="module")
def small() -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(AutoencoderKL(block_out_channels=(32,), layers_per_block=1).eval(), name="small")


@pytest.fixture(scope="module")
def ldm(small: KLAutoencoder) -> dict[str, Tensor]:
    """Its weights under CompVis' names."""
    return diffusers_to_ldm(small.model.state_dict(), 1)


@pytest.fixture
def folder(small: KLAutoencoder, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    small.save(path)
    return path


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1.0 for name, tensor in state.items()}


def fault(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoints_of_training_codes(
    small: KLAutoencoder, ldm: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MAR's and LlamaGen's container, REPA-E's, VA-VAE's extra keys, an LDM with averages of the autoencoder."""
    averages = {"model_ema." + name.replace(".", ""): tensor for name, tensor in ldm.items()}
    contents: dict[str, Any] = {
        "mar": {"model": ldm},
        "repae": {"model": {"x_embedder.proj.weight": torch.ones(1)}, "ema": {"x_embedder.proj.weight": torch.ones(1)},
                  "vae": {f"module.{name}": tensor for name, tensor in ldm.items()}, "opt": {},
                  "discriminator": {"a": torch.ones(1)}, "args": argparse.Namespace(vae="f8d4"), "steps": 400_000},
        "vavae": {"state_dict": ldm | {"foundation_model.model.a": torch.ones(1), "linear_proj.weight": torch.ones(1)}},
        "ldm": {"state_dict": changed(ldm) | averages | {"loss.a": torch.ones(1)}},
        "ema": {"model": changed(ldm), "ema": ldm},
    }  # fmt: skip
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert load_autoencoder(str(tmp_path / f"{name}.pt")).fingerprint() == small.fingerprint(), name
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"'{tmp_path / name}.pt'"), name
    raw = load_autoencoder(str(tmp_path / "ema.pt#raw"))
    assert raw.fingerprint() != small.fingerprint() and raw.name.endswith("ema.pt#raw")
    assert capsys.readouterr().err == ""


def test_mars_encoder_attends_and_its_decoder_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}
    model = AutoencoderKL(block_out_channels=(32, 64), **blocks, up_block_types=("UpDecoderBlock2D",) * 2).eval()
    torch.save({"model": diffusers_to_ldm(model.state_dict(), 2)}, tmp_path / "kl16.ckpt")
    autoencoder = load_autoencoder(str(tmp_path / "kl16.ckpt"))
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model.encode(x).latent_dist.mean
        torch.testing.assert_close(autoencoder.encode(x).mean, expected)
        torch.testing.assert_close(autoencoder.decode(expected), model.decode(expected).sample)


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.bf16.safetensors", "model.safetensors",
     "diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.non_ema.bin"],
)  # fmt: skip
def test_variants_of_a_folders_weights(name: str, small: KLAutoencoder, folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    dtype = torch.bfloat16 if "bf16" in name else torch.float16 if "fp16" in name else torch.float32
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    torch.save(state, folder / name) if name.endswith(".bin") else save_file(state, folder / name)
    for given in (folder, folder / name, folder / "config.json"):
        loaded = load_autoencoder(str(given))
        for key, tensor in loaded.model.state_dict().items():
            assert torch.equal(tensor, state[key].float())
    save_file(small.model.state_dict(), folder / WEIGHTS)
    assert load_autoencoder(str(folder)).fingerprint() == small.fingerprint()  # whole and averaged before all others
    if "non_ema" in name:
        save_file(changed(state), folder / WEIGHTS)
        assert load_autoencoder(f"{folder}#raw").fingerprint() == small.fingerprint()


@pytest.mark.parametrize(
    ("index", "shard"),
    [("safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-{:05d}-of-00002.safetensors"),
     ("fp16.safetensors.index.json", "diffusion_pytorch_model-{:05d}-of-00002.fp16.safetensors")],
)  # fmt: skip
def test_an_index_of_half_precision_shards(index: str, shard: str, folder: Path) -> None:
    index = f"diffusion_pytorch_model.{index}"
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {key: shard.format(1 + place % 2) for place, key in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({key: state[key].half() for key in state if weight_map[key] == file}, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    for given in (folder, folder / index):
        loaded = load_autoencoder(str(given)).model.state_dict()
        assert all(torch.equal(loaded[key], tensor.half().float()) for key, tensor in state.items())


def test_a_file_of_diffusers_without_its_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json lies beside it" in fault(folder / WEIGHTS)


def test_two_files_of_other_names_are_not_chosen_from(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "a.safetensors")
    (folder / WEIGHTS).rename(folder / "b.safetensors")
    assert "no weights" in fault(folder) and "name the file" in fault(folder)
    load_autoencoder(str(folder / "a.safetensors"))


def test_what_lies_under_a_presets_name_is_not_passed_over_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-kl").mkdir()
    load_autoencoder("tiny-kl")
    assert "'tiny-kl' is the preset of this name; write './tiny-kl'" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_autoencoder_is_refused(value: float, folder: Path, ldm: dict[str, Tensor], tmp_path: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["decoder.conv_out.weight"][0, 0, 0, 0] = value
    save_file(state, folder / WEIGHTS)
    assert f"'{folder / WEIGHTS}' has diverged or is damaged: 'decoder.conv_out.weight'" in fault(folder)
    state = {name: tensor.clone() for name, tensor in ldm.items()}
    state["encoder.conv_in.bias"][:] = value
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert f"'{tmp_path / 'a.ckpt'}' has diverged" in fault(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 10_000_000}, {"norm_num_groups": -1}, {"norm_num_groups": True}, {"norm_num_groups": 0},
        {"layers_per_block": -1}, {"layers_per_block": 1.5}, {"layers_per_block": "1"}, {"latent_channels": 10**30},
        {"block_out_channels": [32] * 100_000}, {"block_out_channels": []}, {"block_out_channels": 32},
        {"block_out_channels": [True]}, {"down_block_types": "DownEncoderBlock2D"}, {"act_fn": 3}, {"act_fn": "exec"},
        {"scaling_factor": "1"}, {"in_channels": 4}, {"out_channels": 1}, {"down_block_types": ["NoBlock"]},
        {"mid_block_add_attention": "no"}, {"scaling_factor": True}, {"block_out_channels": [-32]},
        {"block_out_channels": {"a": 1}}, {"latent_channels": []}, {"sample_size": None, "norm_num_groups": 3},
        {"shift_factor": "1"}, {"latents_mean": "abcd", "latents_std": [1.0] * 4}, {"latents_std": [0.0] * 4},
        {"latents_mean": [0.0] * 3},
    ],
    ids=lambda change: str(change)[:60],
)  # fmt: skip
def test_configs_that_describe_no_autoencoder(change: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    began_sec = time.monotonic()
    assert "config.json" in fault(folder)
    assert time.monotonic() - began_sec < 10


@pytest.mark.parametrize(
    "text",
    ["[" * 2000, '{"a": ' * 2000, '{"_class_name": "AutoencoderKL", "layers_per_block": NaN}', "[]", "\xff\xfe"],
    ids=["brackets", "braces", "nan", "list", "bytes"],
)
def test_configs_that_are_no_json(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in fault(folder)


def test_packaged_weights_load_as_ever() -> None:
    for path in PACKAGED.iterdir():
        assert load_autoencoder(path.name).fingerprint() == load_autoencoder(str(path)).fingerprint()
