"""Round trips between diffusers' folders and CompVis' files are bitwise; what does not fit is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from eqvae.artifacts.files import write_json
from eqvae.autoencoders import PRESETS, LatentStatistics, load_autoencoder
from eqvae.autoencoders.compvis import describe
from eqvae.autoencoders.convert import convert_autoencoder
from eqvae.autoencoders.families import KLAutoencoder, TinyAutoencoder, VQAutoencoder
from eqvae.autoencoders.layouts import diffusers_to_ldm
from eqvae.autoencoders.loading import build_autoencoder
from eqvae.errors import UserError

CARD = {"base": "somewhere", "num_steps": 3, "latent_mean": [0.5]}


@pytest.fixture
def kl_folder(attending_kl: AutoencoderKL, tmp_path: Path) -> Path:
    """A fine-tuned model's folder: measured scaling and shift factors, a card."""
    autoencoder = KLAutoencoder(attending_kl, name="small")
    autoencoder.set_latent_statistics(LatentStatistics(mean=(0.5,) * 6, std=(4.0,) * 6))
    folder = tmp_path / "run" / "autoencoder"
    folder.mkdir(parents=True)
    autoencoder.save(folder)
    write_json(folder / "eqvae.json", CARD)
    write_json(tmp_path / "run" / "config.json", {"command": "finetune"})
    return tmp_path / "run"


@pytest.fixture
def vq_folder(vqgan: VQModel, tmp_path: Path) -> Path:
    folder = tmp_path / "vq"
    folder.mkdir()
    VQAutoencoder(vqgan, name="small").save(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(*arguments: Any) -> str:
    """The one line that a conversion ends with; its destination is as it was."""
    destination = Path(arguments[1])
    before = sorted(path.name for path in destination.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert_autoencoder(*arguments)
    assert sorted(path.name for path in destination.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Round trips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["kl_folder", "vq_folder"])
@torch.no_grad()
def test_there_and_back_is_bitwise(which: str, request: pytest.FixtureRequest, images: Tensor, tmp_path: Path) -> None:
    source = request.getfixturevalue(which)
    file = convert_autoencoder(str(source), tmp_path / "model.safetensors", "ldm").path
    back = convert_autoencoder(str(file), tmp_path / "back", "diffusers").path
    # Config, card and weights, byte for byte.
    assert content(back) == content(source / "autoencoder" if which == "kl_folder" else source)
    again = convert_autoencoder(str(back), tmp_path / "again.safetensors", "ldm").path
    assert again.read_bytes() == file.read_bytes()
    before, between, after = (load_autoencoder(str(path)) for path in (source, file, back))
    assert before.fingerprint() == between.fingerprint() == after.fingerprint()
    z = before.encode(images).mean
    for other in (between, after):
        assert torch.equal(other.encode(images).mean, z)
        assert torch.equal(other.decode(z), before.decode(z))


@torch.no_grad()
def test_folders_are_diffusers_own(kl_folder: Path, vq_folder: Path, images: Tensor, tmp_path: Path) -> None:
    theirs = AutoencoderKL.from_pretrained(convert_autoencoder(str(kl_folder), tmp_path / "kl", "diffusers").path)
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (0.25, 0.5)
    assert torch.equal(theirs.encode(images).latent_dist.mean, load_autoencoder(str(kl_folder)).encode(images).mean)
    converted = convert_autoencoder(str(vq_folder), tmp_path / "copy", "diffusers")
    assert converted.advice == ("load it with diffusers.VQModel.from_pretrained",)
    assert VQModel.from_pretrained(converted.path).config.num_vq_embeddings == 40


def test_files_are_what_diffusers_own_converter_reads(
    kl_folder: Path, attending_kl: AutoencoderKL, tmp_path: Path
) -> None:
    state = load_file(convert_autoencoder(str(kl_folder), tmp_path / "model.safetensors", "ldm").path)
    assert {key.split(".")[0] for key in state} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    # It leaves the attention blocks of resolutions under their old names.
    theirs = convert_ldm_vae_checkpoint(state, attending_kl.config)
    expected = attending_kl.state_dict()
    found = {key: tensor for key, tensor in theirs.items() if key in expected}
    assert all("_blocks.2.attentions." in key or "up_blocks.0.attentions." in key for key in expected.keys() - found)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


def test_first_stages_of_diffusion_checkpoints_come_out_alone(attending_kl: AutoencoderKL, tmp_path: Path) -> None:
    own = diffusers_to_ldm(attending_kl.state_dict(), 3)
    state = {f"first_stage_model.{key}": tensor for key, tensor in own.items()}
    torch.save({"state_dict": state | {"model.diffusion_model.x": torch.zeros(1)}}, tmp_path / "diffusion.ckpt")
    converted = convert_autoencoder(str(tmp_path / "diffusion.ckpt"), tmp_path / "first.safetensors", "ldm")
    written = load_file(converted.path)
    assert written.keys() == own.keys()
    assert all(torch.equal(written[key], own[key]) for key in own)
    assert not any("scale_factor" in line for line in converted.advice)  # which nobody knows here
    folder = convert_autoencoder(str(tmp_path / "diffusion.ckpt"), tmp_path / "folder", "diffusers")
    assert any("scaling_factor 0.18215" in line and "Stable Diffusion's" in line for line in folder.advice)
    after = convert_autoencoder(str(tmp_path / "first.safetensors"), tmp_path / "after", "diffusers")
    assert any("scaling_factor 0.18215" in line for line in after.advice)


def test_tiny_pairs_become_folders(small_tiny: AutoencoderTiny, tmp_path: Path) -> None:
    TinyAutoencoder(small_tiny, name="tiny").save(tmp_path)
    folder = convert_autoencoder(str(tmp_path), tmp_path / "out" / "tiny", "diffusers").path
    theirs = AutoencoderTiny.from_pretrained(folder)
    assert all(torch.equal(value, small_tiny.state_dict()[key]) for key, value in theirs.state_dict().items())
    converted = convert_autoencoder("untrained:taef2", tmp_path / "out" / "taef2", "diffusers")
    assert converted.advice == ("load it with eqvae.autoencoders.tiny.PooledAutoencoderTiny.from_pretrained",)


def test_packaged_models_keep_their_card(tmp_path: Path) -> None:
    folder = convert_autoencoder("tiny-kl", tmp_path / "tiny-kl", "diffusers").path
    packaged = PRESETS["tiny-kl"].packaged
    assert packaged is not None
    assert json.loads((folder / "eqvae.json").read_text()) == json.loads((packaged / "eqvae.json").read_text())
    assert load_autoencoder(str(folder)).fingerprint() == load_autoencoder("tiny-kl").fingerprint()
    copy = convert_autoencoder("untrained:tiny-kl", tmp_path / "untrained", "diffusers").path
    assert not (copy / "eqvae.json").exists()


# What a user must set -----------------------------------------------------------------------------------------------


def test_scaling_that_an_ldm_file_cannot_hold_is_told(kl_folder: Path, tmp_path: Path) -> None:
    naming, building, scale, shift = convert_autoencoder(str(kl_folder), tmp_path / "model.safetensors", "ldm").advice
    assert "without prefix" in naming
    assert building.startswith('for ldm.models.autoencoder.AutoencoderKL: {"embed_dim": 6, "ddconfig": {')
    assert "scale_factor: 0.25" in scale
    assert "subtract 0.5" in shift


def test_published_architectures_are_compvis_own_configs() -> None:
    """`configs/autoencoder/autoencoder_kl_32x32x4.yaml` and `..._16x16x16.yaml`; taming's `custom_vqgan.yaml`."""

    def described(preset: str) -> dict[str, Any]:
        with torch.device("meta"):
            model: Any = build_autoencoder(preset, seed=0).model
        return describe(model, preset)

    fixed = {"resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "num_res_blocks": 2, "dropout": 0.0}
    f8 = fixed | {"double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4], "attn_resolutions": []}
    f16 = fixed | {"z_channels": 16, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}
    kl, vq = "ldm.models.autoencoder.AutoencoderKL", "ldm.models.autoencoder.VQModel"
    assert described("sd-vae") == {"target": kl, "embed_dim": 4, "ddconfig": f8}
    assert described("sd-vae-16") == {"target": kl, "embed_dim": 16, "ddconfig": f16 | {"double_z": True}}
    ddconfig = f16 | {"double_z": False, "z_channels": 256}
    assert described("vqgan-f16-1024") == {"target": vq, "embed_dim": 256, "n_embed": 1024, "ddconfig": ddconfig}
    assert "Encoder and Decoder" in described("sd3-vae")["target"]  # it has no quant_conv


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taesd", "untrained:taef2", "dc-ae-f32c32", "flux2-vae"])
def test_other_families_are_refused_before_anything_is_fetched(name: str, tmp_path: Path) -> None:
    line = refused(name, tmp_path / "model.safetensors", "ldm")
    assert name in line and PRESETS[name.removeprefix("untrained:")].architecture.class_name in line


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"norm_num_groups": 8}, "8 groups instead of 32"),
        ({"act_fn": "relu"}, "relu"),
        ({"block_out_channels": (64, 96)}, "no multiples"),
        ({"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}, "at different resolutions"),
        (
            {
                "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
                "mid_block_add_attention": False,
            },
            "not in the middle",
        ),
    ],
)
def test_architectures_that_compvis_code_would_run_otherwise_are_refused(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain: dict[str, Any] = {
        "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    folder = tmp_path / "source"
    folder.mkdir()
    KLAutoencoder(AutoencoderKL(**plain | changes), name="small").save(folder)
    assert what in refused(str(folder), tmp_path / "model.safetensors", "ldm")


def test_models_without_any_attention_say_so_in_their_config() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    model = AutoencoderKL(**blocks, block_out_channels=(32,), layers_per_block=1, mid_block_add_attention=False)
    assert describe(model, "small")["ddconfig"]["attn_type"] == "none"


def test_taken_or_unfit_destinations_are_refused(small_flux2: AutoencoderKLFlux2, tmp_path: Path) -> None:
    KLAutoencoder(small_flux2, name="small").save(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"precious")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    assert "exists" in refused(str(tmp_path), tmp_path / "empty", "diffusers")
    assert "exists" in refused(str(tmp_path), tmp_path / "file.safetensors", "ldm")
    assert "exists" in refused(str(tmp_path), tmp_path / "dangling.safetensors", "ldm")
    assert (tmp_path / "file.safetensors").read_bytes() == b"precious"
    assert ".safetensors" in refused("tiny-kl", tmp_path / "model.bin", "ldm")
    assert "folder" in refused("tiny-kl", tmp_path / "model.safetensors", "diffusers")
    with pytest.raises(UserError, match="no folder"):
        convert_autoencoder("tiny-kl", tmp_path / "file.safetensors" / "inside", "diffusers")
    assert "does not exist" in refused("./no/such/model", tmp_path / "out", "diffusers")


def test_an_error_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, card: dict[str, Any]) -> None:
        assert path.with_name("config.json").exists()  # the weights are written already
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("eqvae.autoencoders.convert.write_json", fail)
    with pytest.raises(OSError, match="No space"):
        convert_autoencoder("tiny-kl", tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_header_is_told(attending_kl: AutoencoderKL, tmp_path: Path) -> None:
    state = {key: tensor.contiguous() for key, tensor in diffusers_to_ldm(attending_kl.state_dict(), 3).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"eqvae": "{"})
    assert "header" in refused(str(tmp_path / "model.safetensors"), tmp_path / "out", "diffusers")


def test_a_pairs_note_is_its_own_and_follows_it(tmp_path: Path) -> None:
    source = load_autoencoder("untrained:taesd")
    source.model.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    torch.nn.init.ones_(source.model.encoder.layers[0].bias)  # those of one seed are alike
    source.save(tmp_path / "source")
    pair = convert_autoencoder(str(tmp_path / "source"), tmp_path / "pair", "taesd").path
    for path in pair.glob("*.pth"):
        path.rename(pair / path.name.replace("taesd", "taesd-mine"))
    assert load_autoencoder(str(pair)).model.config.scaling_factor == 2.0
    other = convert_autoencoder("untrained:taesdxl", tmp_path / "other", "taesd").path
    names = sorted(path.name for path in other.glob("*.pth"))
    assert names == ["taesdxl_decoder.pth", "taesdxl_encoder.pth"]
    for name in names:
        shutil.copy(other / name, pair / name)
    assert load_autoencoder(str(pair / names[1])).model.config.scaling_factor == 1.0
    flux = convert_autoencoder("untrained:taef1", tmp_path / "flux", "taesd").path
    assert (flux / "taef1_encoder.pth").is_file()


def test_a_file_in_a_folder_keeps_the_folders_card(tmp_path: Path) -> None:
    folder = convert_autoencoder("tiny-kl", tmp_path / "tiny-kl", "diffusers").path
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        copy = convert_autoencoder(str(folder / name), tmp_path / name.partition(".")[0], "diffusers").path
        assert (copy / "eqvae.json").read_text() == (folder / "eqvae.json").read_text()


def test_what_a_file_is_its_first_bytes_say(kl_folder: Path, tmp_path: Path) -> None:
    convert_autoencoder(str(kl_folder), tmp_path / "kl.safetensors", "ldm")
    expected = load_autoencoder(tmp_path / "kl.safetensors")
    for name in ("kl.ckpt", "kl.sft", "kl_encoder.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "kl.safetensors").read_bytes())
        found = load_autoencoder(tmp_path / name)
        assert found.fingerprint() == expected.fingerprint()
        assert found.model.config.scaling_factor == expected.model.config.scaling_factor
