"""Every format there and back, bit for bit; what peers' codes read; what they would build otherwise is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from safetensors import safe_open
from torch import Tensor

from eqvae.artifacts.files import write_json
from eqvae.autoencoders import LatentStatistics, load_autoencoder
from eqvae.autoencoders.compvis import describe
from eqvae.autoencoders.convert import Format, convert_autoencoder
from eqvae.autoencoders.families import TinyAutoencoder, find_family
from eqvae.autoencoders.layouts import block_types
from eqvae.autoencoders.presets import PRESETS
from eqvae.errors import UserError

Save = Callable[[str, dict[str, Any]], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a folder of random weights, measured factors and a card."""

    def save(class_name: str, config: dict[str, Any]) -> Path:
        torch.manual_seed(0)
        autoencoder = find_family(class_name, "test").build(class_name, config, name="test")
        channels = autoencoder.latent_channels
        autoencoder.set_latent_statistics(LatentStatistics(mean=(0.5,) * channels, std=(4.0,) * channels))
        folder = tmp_path / "source"
        folder.mkdir()
        autoencoder.save(folder)
        write_json(folder / "eqvae.json", {"base": "somewhere", "num_steps": 3})
        return folder

    return save


def there_and_back(source: Path, to: Format, name: str) -> Path:
    """Convert and convert back; folders, written anew, are the same bytes."""
    converted = convert_autoencoder(str(source), source.with_name(name), to)
    back = convert_autoencoder(str(converted.path), source.with_name("back"), "diffusers")
    assert converted.largest_difference == back.largest_difference == 0.0
    before, after = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (source, back.path))
    assert before.keys() == after.keys()
    for file in before:
        assert before[file] == after[file], file
    num_tensors = len(load_autoencoder(str(source)).model.state_dict())  # type: ignore[arg-type,operator,union-attr]
    assert converted.keys.startswith(f"{num_tensors} tensors, ") and "left out" not in converted.keys
    assert converted.keys == back.keys
    return converted.path


KL = {
    "block_out_channels": (32, 32, 64), **block_types((False, False, True)), "layers_per_block": 1,
    "latent_channels": 4,
}  # fmt: skip
VQ = KL | {"num_vq_embeddings": 40, "vq_embed_dim": 6}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


@pytest.mark.parametrize(
    ("class_name", "config", "to", "name"),
    [
        ("AutoencoderKL", KL, "ldm", "a.ckpt"),
        ("AutoencoderKL", KL, "stability", "a.safetensors"),
        ("AutoencoderKL", KL | NO_QUANT, "stability", "a.ckpt"),
        ("VQModel", VQ, "taming", "a.ckpt"),
        ("AutoencoderTiny", {"latent_channels": 16}, "taesd", "pair"),
        ("PooledAutoencoderTiny", {"latent_channels": 32}, "taesd", "pair"),
    ],
)
def test_there_and_back(class_name: str, config: dict[str, Any], to: Format, name: str, save: Save) -> None:
    path = there_and_back(save(class_name, config), to, name)
    if to == "stability" and path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names, header = file.keys(), file.metadata()
        assert all(name.startswith("first_stage_model.") for name in names)
        assert header["modelspec.architecture"] == "autoencoder-kl-f4d4/vae"
    elif to != "taesd":
        content = torch.load(path, weights_only=True)
        assert content.keys() == {"state_dict", "eqvae"} and json.loads(content["eqvae"])["scaling_factor"]
        assert ("quantize.embedding.weight" in content["state_dict"]) == (class_name == "VQModel")


F16 = (128, 128, 256, 256, 512)
MAR = {
    "block_out_channels": F16, "layers_per_block": 2, "latent_channels": 16,
    **block_types((False,) * 4 + (True,), (False,) * 5),
}  # fmt: skip
VA_VAE = MAR | {"latent_channels": 32, **block_types((False,) * 4 + (True,))}


def vq(channels: tuple[int, ...], attends: tuple[bool, ...], num_codes: int, width: int) -> dict[str, Any]:
    """Describe one of LDM's, whose `z_channels` and `embed_dim` are the same."""
    return {
        "block_out_channels": channels, **block_types(attends), "layers_per_block": 2, "latent_channels": width,
        "vq_embed_dim": width, "num_vq_embeddings": num_codes,
    }  # fmt: skip


def preset(name: str) -> tuple[str, dict[str, Any]]:
    return PRESETS[name].architecture


REAL_SIZES: list[Any] = [
    (*preset("sd-vae"), "ldm", "a.ckpt", 83_653_863),
    (*preset("sd-vae"), "stability", "a.safetensors", 83_653_863),
    (*preset("sdxl-vae"), "comfyui", "a.safetensors", 83_653_863),
    (*preset("sd3-vae"), "comfyui", "a.safetensors", 83_819_683),
    (*preset("taesd"), "taesd", "pair", 2_445_063),
    ("VQModel", vq((128, 256, 512), (False,) * 3, 8192, 3), "taming", "f4.ckpt", 55_322_782),
    ("VQModel", vq((128, 256, 256, 512), (False,) * 3 + (True,), 16384, 4), "taming", "f8.ckpt", 67_717_295),
    (*preset("vqgan-f16-16384"), "taming", "f16.ckpt", 76_073_859),
    ("AutoencoderKL", MAR, "mar", "kl16.ckpt", 66_456_019),
    ("AutoencoderKL", VA_VAE, "va-vae", "f16d32.pt", 69_836_067),
]


@pytest.mark.slow
@pytest.mark.parametrize(("class_name", "config", "to", "name", "num_numbers"), REAL_SIZES)
def test_there_and_back_at_the_public_models_sizes(
    class_name: str, config: dict[str, Any], to: Format, name: str, num_numbers: int, save: Save
) -> None:
    source = save(class_name, config)
    path = there_and_back(source, to, name)
    assert load_autoencoder(str(source)).num_parameters() == num_numbers
    if to in ("mar", "va-vae"):
        state = torch.load(path, weights_only=True)["model" if to == "mar" else "state_dict"]
        assert {"encoder.down.4.attn.1.q.weight", "decoder.mid.attn_1.q.weight"} <= state.keys()
        attending = [name for name in state if re.match(r"decoder\.up\.\d\.attn", name)]
        assert {name.split(".")[2] for name in attending} == (set() if to == "mar" else {"4"})
    for file in source.parent.rglob("*"):  # a gigabyte for each
        if file.is_file():
            file.unlink()


def test_a_pair_is_its_authors(shared: Path, tmp_path: Path) -> None:
    pair = {
        file.name: file for file in (shared / "models" / "taesd").iterdir() if file.suffix in (".pth", ".safetensors")
    }
    if not any("_encoder" in name for name in pair):
        pytest.skip("the shared model is not a pair")
    converted = convert_autoencoder(str(shared / "models" / "taesd"), tmp_path / "pair", "taesd")
    for part in ("encoder", "decoder"):
        theirs = torch.load(next(file for name, file in pair.items() if part in name), weights_only=True)
        ours = torch.load(tmp_path / "pair" / f"taesd_{part}.pth", weights_only=True)
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "latent_channels=4" in converted.advice[0]


def test_a_checkpoint_loads_as_peers_load_it(save: Save, tmp_path: Path) -> None:
    """LDM's own loader takes `["state_dict"]`, and its names are those of the layers that it builds."""
    source = save("AutoencoderKL", KL)
    path = convert_autoencoder(str(source), tmp_path / "a.ckpt", "ldm").path
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    theirs = AutoencoderKL.from_pretrained(source)
    assert torch.equal(state["decoder.up.2.block.0.conv1.weight"], theirs.decoder.up_blocks[0].resnets[0].conv1.weight)
    query = theirs.encoder.mid_block.attentions[0].to_q.weight
    assert torch.equal(state["encoder.mid.attn_1.q.weight"], query[:, :, None, None])


def test_what_codes_would_build_otherwise_is_refused(save: Save, tmp_path: Path) -> None:
    kl = str(save("AutoencoderKL", KL))

    def refused(source: str, to: Format, name: str) -> str:
        with pytest.raises(UserError) as caught:
            convert_autoencoder(source, tmp_path / name, to)
        assert not (tmp_path / name).exists()
        return str(caught.value)

    assert "has 1 blocks at a resolution, not 2" in refused(kl, "comfyui", "a.safetensors")
    assert "MAR's format" in refused(kl, "mar", "a.ckpt")
    assert "VA-VAE's format" in refused(kl, "va-vae", "a.pt")
    assert "class AutoencoderKL" in refused(kl, "taming", "a.ckpt")
    assert "class AutoencoderKL" in refused(kl, "taesd", "pair")
    assert "class VQModel" in refused("untrained:tiny-vq", "comfyui", "a.safetensors")
    assert "end in .pt or .ckpt" in refused(kl, "va-vae", "a.safetensors")
    assert "is to be a folder" in refused(kl, "taesd", "a.pth")


def test_formats_differ_in_where_they_attend() -> None:
    """LDM attends in both halves or none; MAR in its encoder alone; ComfyUI in the middle alone."""

    def model(config: dict[str, Any]) -> AutoencoderKL:
        with torch.device("meta"):
            return AutoencoderKL(**config)

    mar, va_vae = model(MAR), model(VA_VAE)
    assert describe(mar, "m", "mar") == {
        "target": "models.vae.AutoencoderKL",
        "embed_dim": 16,
        "ch_mult": [1, 1, 2, 2, 4],
    }
    assert describe(va_vae, "m", "va-vae")["embed_dim"] == 32
    assert describe(va_vae, "m", "ldm")["ddconfig"]["attn_resolutions"] == [16]
    for each, to, what in (
        (mar, "ldm", "at different resolutions"), (mar, "va-vae", "at different resolutions"),
        (va_vae, "mar", "its decoder attends"), (va_vae, "comfyui", "attends in the middle alone"),
        (model(VA_VAE | {**block_types((False,) * 5)}), "mar", "does not attend at 16 px"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=what):
            describe(each, "m", to)


def test_a_pair_tells_its_latent_channels_alone(small_tiny: AutoencoderTiny, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    TinyAutoencoder(small_tiny, name="tiny").save(tmp_path / "source")
    with pytest.raises(UserError, match="encoder_block_out_channels is"):
        convert_autoencoder(str(tmp_path / "source"), tmp_path / "pair", "taesd")


def test_taming_s_advice_names_its_class(vqgan: VQModel) -> None:
    described = describe(vqgan, "small", "taming")
    assert described["target"] == "taming.models.vqgan.VQModel" and described["n_embed"] == 40
