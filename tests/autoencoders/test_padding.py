"""Padding by reflection: what it does to borders, that it is kept, and that weights stay what they were."""

import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from eqvae import load_autoencoder, set_padding_mode
from eqvae.autoencoders import build_autoencoder
from eqvae.autoencoders.convert import convert_autoencoder
from eqvae.autoencoders.families import KLAutoencoder
from eqvae.autoencoders.padding import padding_mode_of
from eqvae.errors import UserError

GREY = torch.full((1, 3, 64, 96), 0.3)


@pytest.fixture(params=["tiny-kl", "tiny-vq"])
def autoencoder(request):
    return build_autoencoder(request.param, seed=0)


def spread(values: torch.Tensor) -> float:
    """How much a channel varies from place to place."""
    return float((values.amax((2, 3)) - values.amin((2, 3))).max())


@torch.inference_mode()
def test_a_grey_picture_has_no_border(autoencoder):
    z = autoencoder.encode(GREY).mean
    zeros = spread(z)
    set_padding_mode(autoencoder, "reflect")
    reflected = autoencoder.encode(GREY).mean
    assert spread(reflected) < 1e-3 < 0.05 * zeros  # also where diffusers pads by itself before it halves
    assert spread(autoencoder.decode(reflected)) < 1e-3
    set_padding_mode(autoencoder, "zeros")
    assert torch.equal(autoencoder.encode(GREY).mean, z)


@torch.inference_mode()
def test_it_is_kept_and_diffusers_takes_one_line(tmp_path):
    autoencoder = build_autoencoder("tiny-kl", seed=0)
    before = autoencoder.fingerprint(), autoencoder.encoder_fingerprint()
    set_padding_mode(autoencoder, "reflect")
    assert {autoencoder.fingerprint(), autoencoder.encoder_fingerprint()}.isdisjoint(before)
    expected = autoencoder.encode(GREY).mean
    (tmp_path / "ours").mkdir()
    autoencoder.save(tmp_path / "ours")
    loaded = load_autoencoder(str(tmp_path / "ours"))
    assert (padding_mode_of(loaded), loaded.fingerprint()) == ("reflect", autoencoder.fingerprint())
    assert torch.equal(loaded.encode(GREY).mean, expected)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert not torch.allclose(theirs.encode(GREY).latent_dist.mean, expected, atol=1e-3)
    set_padding_mode(theirs, "reflect")  # the documented line
    assert torch.equal(theirs.encode(GREY).latent_dist.mean, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_autoencoder(str(tmp_path / "theirs")).encode(GREY).mean, expected)


def test_a_file_under_compvis_names_keeps_it_in_its_header(tmp_path):
    config = {
        "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4,
    }  # fmt: skip
    autoencoder = KLAutoencoder.build("AutoencoderKL", config, name="small")
    set_padding_mode(autoencoder, "reflect")
    autoencoder.save(tmp_path)
    converted = convert_autoencoder(str(tmp_path), tmp_path / "ldm.safetensors", "ldm")
    assert any("set_padding_mode" in line for line in converted.advice)
    convert_autoencoder(str(tmp_path / "ldm.safetensors"), tmp_path / "back", "diffusers")
    assert load_autoencoder(str(tmp_path / "back")).fingerprint() == autoencoder.fingerprint()


def test_what_is_no_padding_mode(tmp_path):
    autoencoder = build_autoencoder("tiny-kl", seed=0)
    autoencoder.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "padding_mode" not in config
    (tmp_path / "config.json").write_text(json.dumps(config | {"padding_mode": "reflection"}))
    with pytest.raises(UserError, match=r"does not describe an AutoencoderKL \(There is no padding mode 'reflection'"):
        load_autoencoder(str(tmp_path))
