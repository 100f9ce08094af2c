"""Names lead to the right loader, and everything that does not fit is one line."""

import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqvae.artifacts.weights import plain_names, read_named
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.families import KLAutoencoder
from eqvae.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(small_kl: AutoencoderKL, tmp_path: Path) -> Path:
    """A diffusers folder."""
    path = tmp_path / "model"
    path.mkdir()
    KLAutoencoder(small_kl, name="small").save(path)
    return path


def fault(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_runs_and_pipelines_lead_to_their_autoencoder(folder: Path, tmp_path: Path) -> None:
    expected = load_autoencoder(str(folder)).fingerprint()
    for name in ("autoencoder", "vae"):
        outer = tmp_path / f"with-{name}"
        outer.mkdir()
        (outer / "config.json").write_text('{"command": "finetune"}')
        (outer / name).symlink_to(folder)
        assert load_autoencoder(str(outer)).fingerprint() == expected


def test_shards_and_pickled_weights(folder: Path) -> None:
    expected = load_autoencoder(str(folder)).fingerprint()
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert load_autoencoder(str(folder)).fingerprint() == expected
    (folder / "diffusion_pytorch_model.bin").unlink()
    keys = sorted(state)
    weight_map = {key: f"shard-{index % 2}.safetensors" for index, key in enumerate(keys)}
    for shard in set(weight_map.values()):
        save_file({key: state[key] for key in keys if weight_map[key] == shard}, folder / shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_autoencoder(str(folder)).fingerprint() == expected
    (folder / "shard-1.safetensors").unlink()
    assert "shard-1.safetensors' does not exist" in fault(folder)


def test_half_precision_files_load_as_fp32(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({key: tensor.half() for key, tensor in state.items()}, folder / WEIGHTS)
    assert {parameter.dtype for parameter in load_autoencoder(str(folder)).parameters()} == {torch.float32}


def test_legacy_attention_names_are_converted_as_diffusers_does(folder: Path, images: Tensor) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / WEIGHTS)
    for new, legacy in old.items():
        state = {key.replace(f".{new}.", f".{legacy}."): tensor for key, tensor in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    ours, theirs = load_autoencoder(str(folder)), AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(ours.encode(images).mean, theirs.encode(images).latent_dist.mode())


def test_missing_unexpected_and_reshaped_keys_are_named(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["decoder.conv_out.bias"]
    state["decoder.surplus"] = torch.zeros(1)
    state["encoder.conv_in.bias"] = torch.zeros(3)
    save_file(state, folder / WEIGHTS)
    line = fault(folder)
    assert "1 missing (decoder.conv_out.bias)" in line
    assert "1 unexpected (decoder.surplus)" in line
    assert "1 of another shape (encoder.conv_in.bias (3,) instead of (8,))" in line


def test_many_missing_keys_are_counted(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({key: tensor for key, tensor in state.items() if key.startswith("encoder.")}, folder / WEIGHTS)
    assert ", ...)" in fault(folder)
    assert f"{sum(not key.startswith('encoder.') for key in state)} missing (" in fault(folder)


class Malicious:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused(zipped: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    content = {"state_dict": {"weight": torch.zeros(1)}, "extra": Malicious(target)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Malicious(target)}, protocol=2))
    line = fault(path)
    assert "holds code" in line and "mkdir" in line and "refused" in line
    assert not target.exists()


def test_lightnings_callback_table_is_no_obstacle(tmp_path: Path) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback
    parents = {part: types.ModuleType(part) for part in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (parents | {name: module}).items():
            patch.setitem(sys.modules, key, value)
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {callback: {"best": 1.0}}}, tmp_path / "a.ckpt")
    named = read_named(tmp_path / "a.ckpt")
    assert torch.equal(named.take(plain_names(named))["a"], torch.ones(2))


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_truncated_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = {"weight": torch.arange(4096.0)}
    torch.save(state, path) if path.suffix == ".ckpt" else save_file(state, path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "truncated" in fault(path), length


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(2)])
def test_files_without_weights_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    assert "no named weights" in fault(tmp_path / "model.ckpt")


def test_wrong_configs_are_told(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKl"}))
    assert "unknown class 'AutoencoderKl'. Did you mean 'AutoencoderKL'?" in fault(folder)
    (folder / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 12]}))
    assert "does not describe an AutoencoderKL" in fault(folder)
    (folder / "config.json").write_text('{"command": "finetune"}')
    assert "has not finished" in fault(folder)
    (folder / "config.json").write_text("{")
    assert "no readable JSON" in fault(folder)


def test_empty_folders_are_told(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "no weights" in fault(folder)
    (tmp_path / "empty").mkdir()
    assert "holds no autoencoder" in fault(tmp_path / "empty")


def test_unknown_names_are_told(tmp_path: Path) -> None:
    assert "Did you mean 'sd-vae'?" in fault("sd-vea")
    assert "does not exist" in fault(tmp_path / "nothing")
    assert "does not exist" in fault("runs/nothing.ckpt")


def test_no_network_names_the_offline_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("nobody/nothing", "sdxl-vae"):
        line = fault(name)
        assert "not in the local cache" in line and "cannot be reached" in line
        assert "tiny-kl" in line and "local folder" in line


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_the_local_cache_needs_no_network(
    subfolder: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(folder, repository / "snapshots" / revision / subfolder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = load_autoencoder(str(folder)).fingerprint()
    assert load_autoencoder("some/model").fingerprint() == expected


def test_a_variant_says_which_weights_it_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(folder / WEIGHTS)
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    raw, averaged = load_autoencoder(str(folder)).fingerprint(), "diffusion_pytorch_model.ema.safetensors"
    save_file(doubled, folder / averaged)
    assert load_autoencoder(str(folder)).fingerprint() == raw
    assert f"'{folder}#ema'" in capsys.readouterr().err
    other = load_autoencoder(f"{folder}#ema").fingerprint()
    assert other != raw
    (folder / WEIGHTS).unlink()
    assert load_autoencoder(str(folder)).fingerprint() == other
    assert "holds no raw weights" in fault(f"{folder}#raw")
    save_file(state, folder / "diffusion_pytorch_model.non_ema.safetensors")
    assert load_autoencoder(f"{folder}#raw").fingerprint() == raw
    assert load_autoencoder(f"{folder}#ema").fingerprint() == other


def test_half_precision_in_the_cache_is_not_the_published_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "hub" / "models--some--other" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot / WEIGHTS).unlink()
    half = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(half, snapshot / "diffusion_pytorch_model.fp16.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    load_autoencoder("some/other")  # there is no network
    assert "holds no whole precision" in capsys.readouterr().err

    def download(repository: str, path: str) -> Path:
        if path == WEIGHTS:
            shutil.copy(folder / WEIGHTS, snapshot / WEIGHTS)
        return snapshot / path

    monkeypatch.setattr("eqvae.autoencoders.weight_files._list_files", lambda _: {"config.json", WEIGHTS})
    monkeypatch.setattr("eqvae.autoencoders.weight_files._download", download)
    assert load_autoencoder("some/other").fingerprint() == load_autoencoder(str(folder)).fingerprint()


def test_nobodys_home_is_one_line() -> None:
    assert "nobody's home" in fault("~nosuchuser/vae")
