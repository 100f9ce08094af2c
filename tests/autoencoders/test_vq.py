"""Discrete autoencoders: diffusers' own answers, folders both ways, VQ-GAN's and LlamaGen's files, presets."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from eqvae.autoencoders import DiscreteAutoencoder, LatentStatistics, build_autoencoder, load_autoencoder
from eqvae.autoencoders.families import VQAutoencoder
from eqvae.autoencoders.layouts import diffusers_to_ldm
from eqvae.errors import UserError


def read(autoencoder: DiscreteAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        z = autoencoder.encode(x).mean
        return autoencoder.quantize(z).tokens, autoencoder.decode(z)


# diffusers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vq_is_diffusers_own(vqgan: VQModel, images: Tensor) -> None:
    autoencoder = VQAutoencoder(vqgan, name="small")
    assert (autoencoder.stride, autoencoder.latent_channels, autoencoder.codebook_size) == (4, 6, 40)
    posterior, theirs = autoencoder.encode(images), vqgan.encode(images).latents
    assert posterior.log_variance is None
    assert torch.equal(posterior.mean, theirs)  # before quantization
    tokens = autoencoder.quantize(theirs).tokens
    assert torch.equal(tokens.flatten(), vqgan.quantize(theirs)[2][2])
    assert len(tokens.unique()) > 3
    torch.testing.assert_close(autoencoder.decode(theirs), vqgan.decode(theirs).sample)
    assert torch.equal(autoencoder.decode_tokens(tokens), autoencoder.decode(theirs))


@torch.no_grad()
def test_decoders_that_look_at_the_codes_get_them(images: Tensor) -> None:
    """Kandinsky's variant, whose norms are modulated by the codes."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("AttnUpDecoderBlock2D",) * 2}
    model = VQModel(**blocks, block_out_channels=(32, 32), latent_channels=4, num_vq_embeddings=16, norm_type="spatial")
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    autoencoder = VQAutoencoder(model.eval(), name="spatial")
    z = autoencoder.encode(images).mean
    torch.testing.assert_close(autoencoder.decode(z), model.decode(z).sample, rtol=1e-4, atol=1e-4)


def test_saved_folder_is_diffusers_own(vqgan: VQModel, images: Tensor, tmp_path: Path) -> None:
    autoencoder = VQAutoencoder(vqgan, name="small")
    autoencoder.set_latent_statistics(LatentStatistics(mean=(1.0,) * 6, std=(2.0,) * 6))
    autoencoder.save(tmp_path)
    theirs = VQModel.from_pretrained(tmp_path)
    assert theirs.config.scaling_factor == pytest.approx(1.0 / math.sqrt(5.0))
    ours = load_autoencoder(str(tmp_path))
    assert isinstance(ours, DiscreteAutoencoder)
    assert ours.fingerprint() == autoencoder.fingerprint() == VQAutoencoder(theirs, name="theirs").fingerprint()
    for one, other in zip(read(ours, images), read(autoencoder, images), strict=True):
        assert torch.equal(one, other)


def test_the_fingerprint_sees_the_codebook(vqgan: VQModel) -> None:
    autoencoder = VQAutoencoder(vqgan, name="small")
    before = autoencoder.fingerprint()
    with torch.no_grad():
        autoencoder.codebook[3, 2] += 1e-3
    assert autoencoder.fingerprint() != before


def test_latents_depend_on_the_encoders_parameters_alone(vqgan: VQModel, images: Tensor) -> None:
    autoencoder = VQAutoencoder(vqgan, name="small")
    autoencoder.encode(images).mean.square().sum().backward()
    reached = {id(parameter) for parameter in autoencoder.parameters() if parameter.grad is not None}
    assert reached == {id(parameter) for parameter in autoencoder.encoder_parameters()}


def test_the_last_layer_makes_the_pixels(vqgan: VQModel, images: Tensor) -> None:
    autoencoder = VQAutoencoder(vqgan, name="small")
    _, before = read(autoencoder, images)
    with torch.no_grad():
        for parameter in autoencoder.last_layer.parameters():
            parameter.mul_(2.0)
    torch.testing.assert_close(read(autoencoder, images)[1], 2.0 * before)


# taming-transformers ------------------------------------------------------------------------------------------------


def taming_names(num_levels: int) -> set[str]:
    """The names of a VQ-GAN with two blocks to a level, as `taming/modules/diffusionmodules/model.py` makes them."""
    names = {f"{coder}.{layer}" for coder in ("encoder", "decoder") for layer in ("conv_in", "norm_out", "conv_out")}
    names |= {"quant_conv", "post_quant_conv"}

    def block(prefix: str, shortcut: bool = False) -> set[str]:
        layers = ["norm1", "conv1", "norm2", "conv2", *(["nin_shortcut"] if shortcut else [])]
        return {f"{prefix}.{layer}" for layer in layers}

    def attention(prefix: str) -> set[str]:
        return {f"{prefix}.{layer}" for layer in ("norm", "q", "k", "v", "proj_out")}

    last = num_levels - 1
    for coder in ("encoder", "decoder"):
        names |= block(f"{coder}.mid.block_1") | attention(f"{coder}.mid.attn_1") | block(f"{coder}.mid.block_2")
    for level in range(num_levels):
        for index in range(2):
            names |= block(f"encoder.down.{level}.block.{index}", shortcut=(level, index) == (last, 0))
        for index in range(3):
            names |= block(f"decoder.up.{level}.block.{index}", shortcut=(level, index) == (last - 1, 0))
        names |= {f"encoder.down.{level}.downsample.conv"} if level < last else set()
        names |= {f"decoder.up.{level}.upsample.conv"} if level > 0 else set()
    names |= {name for index in range(2) for name in attention(f"encoder.down.{last}.attn.{index}")}
    names |= {name for index in range(3) for name in attention(f"decoder.up.{last}.attn.{index}")}
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")} | {"quantize.embedding.weight"}


def test_names_are_tamings(vqgan: VQModel) -> None:
    state = diffusers_to_ldm(vqgan.state_dict(), 3)
    assert set(state) == taming_names(3)
    assert state["quantize.embedding.weight"].shape == (40, 6)
    assert state["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


LOSS = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(2)}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_checkpoints_load_strictly_and_reconstruct_the_same(
    vqgan: VQModel, images: Tensor, tmp_path: Path, prefix: str
) -> None:
    autoencoder = VQAutoencoder(vqgan, name="small")
    state = {prefix + name: tensor for name, tensor in diffusers_to_ldm(vqgan.state_dict(), 3).items()}
    others = {"model.diffusion_model.x": torch.zeros(1)} if prefix else LOSS
    torch.save({"state_dict": state | others, "epoch": 3, "global_step": 9}, tmp_path / "last.ckpt")
    ours = load_autoencoder(str(tmp_path / "last.ckpt"))
    assert ours.fingerprint() == autoencoder.fingerprint()
    assert (ours.stride, ours.latent_channels) == (4, 6)
    for one, other in zip(read(ours, images), read(autoencoder, images), strict=True):
        assert torch.equal(one, other)
    ours.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "VQModel"
    exported = diffusers_to_ldm(VQModel.from_pretrained(tmp_path).state_dict(), 3)
    assert all(torch.equal(exported[name.removeprefix(prefix)], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colorize": torch.zeros(1)}, "1 unexpected (colorize)"),
        ({"losses.weight": torch.zeros(1)}, "1 unexpected (losses.weight)"),
        ({"quantize.used": torch.zeros(1)}, "1 unexpected (quantize.used)"),
        ({"quant_conv.bias": None}, "1 missing (quant_conv.bias)"),
        ({"decoder.up.0.block.2.conv1.bias": torch.zeros(3)}, "1 of another shape"),
    ],
)
def test_only_the_losses_entries_are_dropped(vqgan: VQModel, tmp_path: Path, change: dict, says: str) -> None:
    state = diffusers_to_ldm(vqgan.state_dict(), 3) | LOSS | change
    torch.save(
        {"state_dict": {name: tensor for name, tensor in state.items() if tensor is not None}}, tmp_path / "m.ckpt"
    )
    with pytest.raises(UserError, match=re.escape(says)):
        load_autoencoder(str(tmp_path / "m.ckpt"))


def test_a_gumbel_quantizer_is_refused(vqgan: VQModel, tmp_path: Path) -> None:
    state = diffusers_to_ldm(vqgan.state_dict(), 3)
    state["quantize.embed.weight"] = state.pop("quantize.embedding.weight")
    torch.save(state, tmp_path / "gumbel.ckpt")
    with pytest.raises(UserError, match=r"unexpected \(quantize.embed.weight"):
        load_autoencoder(str(tmp_path / "gumbel.ckpt"))


# LlamaGen -----------------------------------------------------------------------------------------------------------


def to_llamagen(state: dict[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Write the names of `tokenizer/tokenizer_image/vq_model.py`."""
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", key)
        key = re.sub(
            r"decoder\.up\.(\d+)\.", lambda found: f"decoder.conv_blocks.{num_levels - 1 - int(found[1])}.", key
        )
        key = re.sub(r"conv_blocks\.(\d+)\.block\.", r"conv_blocks.\1.res.", key)
        for ours, theirs in (("mid.block_1", "mid.0"), ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2")):
            key = key.replace(ours, theirs)
        renamed[key] = tensor
    return renamed | {"quantize.codebook_used": torch.zeros(64)}


def test_llamagens_tokenizer_gives_its_tokens(vqgan: VQModel, images: Tensor, tmp_path: Path) -> None:
    """LlamaGen looks for the nearest direction: normalized latents among normalized codes."""
    state = to_llamagen(diffusers_to_ldm(vqgan.state_dict(), 3), 3)
    assert {"encoder.conv_blocks.2.attn.1.q.weight", "decoder.conv_blocks.0.res.2.conv1.bias"} <= set(state)
    torch.save({"model": state}, tmp_path / "vq_ds4.pt")
    ours = load_autoencoder(str(tmp_path / "vq_ds4.pt"))
    assert isinstance(ours, DiscreteAutoencoder)
    tokens, decoded = read(ours, images)

    with torch.no_grad():
        z = F.normalize(vqgan.encode(images).latents, dim=1).permute(0, 2, 3, 1)
        codes = F.normalize(vqgan.quantize.embedding.weight, dim=1)
        nearest = (z[..., None, :] - codes).square().sum(-1).argmin(-1)
        expected = vqgan.decode(codes[nearest].permute(0, 3, 1, 2), force_not_quantize=True).sample
    assert torch.equal(tokens, nearest)
    assert len(tokens.unique()) > 3
    torch.testing.assert_close(decoded, expected)


def test_llamagens_files_load_strictly(vqgan: VQModel, tmp_path: Path) -> None:
    state = to_llamagen(diffusers_to_ldm(vqgan.state_dict(), 3), 3) | {"quantize.other": torch.zeros(1)}
    torch.save({"model": state}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=re.escape("1 unexpected (quantize.other)")):
        load_autoencoder(str(tmp_path / "model.pt"))


# Presets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_codes"), [("vqgan-f16-1024", 1024), ("vqgan-f16-16384", 16384)])
def test_vqgans_presets_have_tamings_names_and_sizes(name: str, num_codes: int) -> None:
    """Of configs/model.yaml of the published models: 128 channels x (1, 1, 2, 2, 4), attention at 16 px."""
    from eqvae.autoencoders import PRESETS

    with torch.device("meta"):
        model = VQModel(**PRESETS[name].architecture.config)
    state = diffusers_to_ldm(model.state_dict(), 5)
    assert {key for key in state if "nin_shortcut" not in key} == {
        key for key in taming_names(5) if "nin_shortcut" not in key
    }
    assert state["quantize.embedding.weight"].shape == (num_codes, 256)
    assert state["encoder.down.4.block.0.conv1.weight"].shape == (512, 256, 3, 3)
    assert state["encoder.conv_out.weight"].shape == (256, 512, 3, 3)


def test_tiny_presets_are_small() -> None:
    for name, stride in (("tiny-vq", 8), ("tiny-vq-f4", 4)):
        autoencoder = build_autoencoder(name, seed=0)
        assert isinstance(autoencoder, DiscreteAutoencoder)
        assert (autoencoder.stride, autoencoder.codebook_size) == (stride, 1024)
        assert autoencoder.num_parameters() <= 2_400_000
