"""CompVis' names against diffusers' own converter, and architectures read off the shapes."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.layouts import diffusers_to_ldm
from eqvae.errors import UserError


def test_names_are_those_that_diffusers_converts() -> None:
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=(32, 64, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    state = model.state_dict()
    theirs = convert_ldm_vae_checkpoint(diffusers_to_ldm(state, 4), model.config)
    assert {key: tensor.shape for key, tensor in theirs.items()} == {key: value.shape for key, value in state.items()}
    own = diffusers_to_ldm({key: torch.full((1,), float(i)) for i, key in enumerate(state)}, 4)
    back = convert_ldm_vae_checkpoint(own, model.config)
    assert [int(back[key]) for key in state] == list(range(len(state)))


def test_names_of_attending_resolutions(attending_kl: AutoencoderKL) -> None:
    names = set(diffusers_to_ldm(attending_kl.state_dict(), 3))
    assert {"encoder.down.2.attn.1.proj_out.bias", "decoder.up.2.attn.2.norm.weight"} <= names
    assert {"encoder.mid.attn_1.q.weight", "decoder.up.0.block.0.nin_shortcut.weight"} & names
    assert "encoder.down.2.downsample.conv.weight" not in names


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@torch.no_grad()
def test_files_load_with_their_architecture(
    prefix: str, attending_kl: AutoencoderKL, images: Tensor, tmp_path: Path
) -> None:
    state = {prefix + key: tensor for key, tensor in diffusers_to_ldm(attending_kl.state_dict(), 3).items()}
    training_state = {"model.diffusion_model.x": torch.zeros(1)} if prefix else {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": state | training_state, "epoch": 3}, tmp_path / "model.ckpt")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    for file in ("model.ckpt", "model.safetensors"):
        autoencoder = load_autoencoder(str(tmp_path / file))
        assert (autoencoder.stride, autoencoder.latent_channels) == (4, 6)
        posterior = attending_kl.encode(images).latent_dist
        torch.testing.assert_close(autoencoder.encode(images).mean, posterior.mode())
        torch.testing.assert_close(autoencoder.decode(posterior.mode()), attending_kl.decode(posterior.mode()).sample)


def test_files_load_strictly(attending_kl: AutoencoderKL, tmp_path: Path) -> None:
    state = diffusers_to_ldm(attending_kl.state_dict(), 3)
    state["quantize.embedding.weight"] = torch.zeros(4, 4)
    del state["decoder.up.1.block.0.conv1.weight"]
    torch.save(state, tmp_path / "model.ckpt")
    with pytest.raises(UserError) as caught:
        load_autoencoder(str(tmp_path / "model.ckpt"))
    assert "1 missing (decoder.up_blocks.1.resnets.0.conv1.weight)" in str(caught.value)
    assert "1 unexpected (quantize.embedding.weight)" in str(caught.value)


def test_other_weights_are_told_from_an_autoencoder(tmp_path: Path) -> None:
    torch.save({"linear.weight": torch.zeros(2, 2)}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="no autoencoder under CompVis' names"):
        load_autoencoder(str(tmp_path / "model.ckpt"))
