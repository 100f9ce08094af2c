"""Each adapter answers as diffusers' own model does, knows its stride, and survives saving."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from eqvae.autoencoders import LatentStatistics, build_autoencoder, load_autoencoder
from eqvae.autoencoders.families import DCAutoencoder, Flux2Autoencoder, KLAutoencoder, TinyAutoencoder
from eqvae.errors import UserError

STATISTICS = LatentStatistics(mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 2.0))
STD = math.sqrt(23 / 3 - 2.0**2)  # of all values: E[z^2] - E[z]^2


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["small_kl", "attending_kl", "small_flux2"])
@torch.no_grad()
def test_kl_is_diffusers_own(name: str, images: Tensor, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    autoencoder = KLAutoencoder(model, name=name)
    posterior, theirs = autoencoder.encode(images), model.encode(images).latent_dist
    assert torch.equal(posterior.mode(), theirs.mode())
    assert posterior.log_variance is not None and torch.equal(posterior.log_variance, theirs.logvar)
    torch.testing.assert_close(posterior.kl(), theirs.kl())
    expected = (2, autoencoder.latent_channels, 32 // autoencoder.stride, 48 // autoencoder.stride)
    assert posterior.mean.shape == expected
    assert torch.equal(autoencoder.decode(posterior.mean), model.decode(posterior.mean).sample)


@torch.no_grad()
def test_tiny_is_diffusers_own(small_tiny: AutoencoderTiny, images: Tensor) -> None:
    autoencoder = TinyAutoencoder(small_tiny, name="tiny")
    posterior = autoencoder.encode(images)
    assert posterior.log_variance is None
    assert torch.equal(posterior.mean, small_tiny.encode(images).latents)
    assert torch.equal(autoencoder.decode(posterior.mean), small_tiny.decode(posterior.mean).sample)
    assert (autoencoder.stride, autoencoder.latent_channels) == (2, 4)


@torch.no_grad()
def test_dc_is_diffusers_own(small_dc: AutoencoderDC, images: Tensor) -> None:
    autoencoder = DCAutoencoder(small_dc, name="dc")
    posterior = autoencoder.encode(images)
    assert torch.equal(posterior.mean, small_dc.encode(images).latent)
    assert torch.equal(autoencoder.decode(posterior.mean), small_dc.decode(posterior.mean).sample)
    assert posterior.mean.shape == (2, 4, 16, 24)


@pytest.mark.parametrize(
    ("fixture", "adapter"), [("small_kl", KLAutoencoder), ("small_tiny", TinyAutoencoder), ("small_dc", DCAutoencoder)]
)
def test_last_layer_makes_the_pixels(fixture: str, adapter: type, request: pytest.FixtureRequest) -> None:
    """Doubling the last layer doubles what the decoder gives, up to the shift to [-1, 1] of the tiny family."""
    autoencoder = adapter(request.getfixturevalue(fixture), name=fixture)
    z = torch.randn(1, autoencoder.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    offset = 1.0 if adapter is TinyAutoencoder else 0.0
    with torch.no_grad():
        before = autoencoder.decode(z)
        for parameter in autoencoder.last_layer.parameters():
            parameter.mul_(2.0)
        torch.testing.assert_close(autoencoder.decode(z) + offset, 2.0 * (before + offset))


@torch.no_grad()
def test_saved_folder_is_diffusers_own(small_kl: AutoencoderKL, images: Tensor, tmp_path: Path) -> None:
    autoencoder = KLAutoencoder(small_kl, name="small")
    autoencoder.set_latent_statistics(STATISTICS)
    autoencoder.save(tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path)
    z = autoencoder.encode(images).mean
    assert torch.equal(theirs.encode(images).latent_dist.mode(), z)
    assert torch.equal(theirs.decode(z).sample, autoencoder.decode(z))
    assert theirs.config.scaling_factor == pytest.approx(1.0 / STD)
    ours = load_autoencoder(str(tmp_path))
    assert ours.fingerprint() == autoencoder.fingerprint()
    assert not ours.training and all(parameter.requires_grad for parameter in ours.parameters())
    assert torch.equal(ours.decode(z), autoencoder.decode(z))


@pytest.mark.parametrize(
    ("fixture", "adapter"),
    [
        ("small_flux2", Flux2Autoencoder),
        ("attending_kl", KLAutoencoder),
        ("small_tiny", TinyAutoencoder),
        ("small_dc", DCAutoencoder),
    ],
)
def test_round_trip(fixture: str, adapter: type, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    autoencoder = adapter(request.getfixturevalue(fixture), name=fixture)
    autoencoder.save(tmp_path)
    assert (
        type(autoencoder.model).from_pretrained(tmp_path).state_dict().keys() == autoencoder.model.state_dict().keys()
    )
    assert load_autoencoder(str(tmp_path)).fingerprint() == autoencoder.fingerprint()


def test_fingerprint_sees_every_weight(small_kl: AutoencoderKL) -> None:
    autoencoder = KLAutoencoder(small_kl, name="small")
    before = autoencoder.fingerprint()
    with torch.no_grad():
        autoencoder.last_layer.bias[2] += 1e-3
    assert autoencoder.fingerprint() != before


@pytest.mark.parametrize("name", ["tiny-kl", "taesd", "tiny-vq"])
def test_the_encoders_fingerprint_sees_what_latents_depend_on(name: str) -> None:
    """A decoder that was trained further decodes the same latents or tokens; another encoder, or codebook, does not."""
    autoencoder = build_autoencoder(name, seed=0)
    made = {"made_by": "small", "fingerprint": autoencoder.fingerprint()}
    encoder = autoencoder.encoder_fingerprint()
    with torch.no_grad():
        autoencoder.last_layer.bias[0] += 1e-3
    assert autoencoder.encoder_fingerprint() == encoder
    assert autoencoder.fingerprint() != made["fingerprint"]
    assert autoencoder.check_decodes("Made by", **made, encoder_fingerprint=encoder) == autoencoder.fingerprint()
    with pytest.raises(UserError, match="was not recorded"):
        autoencoder.check_decodes("Made by", **made, encoder_fingerprint=None)
    for parameter in [next(autoencoder.encoder_parameters()), getattr(autoencoder, "codebook", None)]:
        if parameter is not None:
            with torch.no_grad():
                parameter.view(-1)[0] += 1.0
            with pytest.raises(UserError, match="has other weights"):
                autoencoder.check_decodes("Made by", **made, encoder_fingerprint=encoder)
            with torch.no_grad():
                parameter.view(-1)[0] -= 1.0


def test_scalar_statistics_are_written(small_kl: AutoencoderKL, small_tiny: AutoencoderTiny, tmp_path: Path) -> None:
    for adapter, model in ((KLAutoencoder, small_kl), (TinyAutoencoder, small_tiny)):
        autoencoder = adapter(model, name="small")
        autoencoder.set_latent_statistics(STATISTICS)
        autoencoder.save(tmp_path)
        assert config_of(tmp_path)["scaling_factor"] == pytest.approx(1.0 / STD)
        assert config_of(tmp_path)["shift_factor"] == pytest.approx(2.0)
    assert "latents_mean" not in config_of(tmp_path)


def test_channel_statistics_are_written_where_the_config_has_them(small_kl: AutoencoderKL, tmp_path: Path) -> None:
    small_kl.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3, scaling_factor=0.5)
    autoencoder = KLAutoencoder(small_kl, name="small")
    autoencoder.set_latent_statistics(STATISTICS)
    autoencoder.save(tmp_path)
    config = config_of(tmp_path)
    assert (config["latents_mean"], config["latents_std"]) == ([1.0, 2.0, 3.0], [1.0, 2.0, 2.0])
    assert config["scaling_factor"] == 1.0


def test_dc_statistics_are_a_scale_only(small_dc: AutoencoderDC, tmp_path: Path) -> None:
    autoencoder = DCAutoencoder(small_dc, name="small")
    autoencoder.set_latent_statistics(STATISTICS)
    autoencoder.save(tmp_path)
    assert config_of(tmp_path)["scaling_factor"] == pytest.approx(1.0 / math.sqrt(23 / 3))
    assert "shift_factor" not in config_of(tmp_path)


@torch.no_grad()
def test_flux2_statistics_normalize_patchified_latents(small_flux2: AutoencoderKLFlux2) -> None:
    """Latents with these very statistics leave the batch norm, patchified as diffusers' pipeline does it, standard."""
    Flux2Autoencoder(small_flux2, name="small").set_latent_statistics(STATISTICS)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (STATISTICS.mean, STATISTICS.std))
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    normalized = small_flux2.bn(pixel_unshuffle(z * std + mean, 2))
    torch.testing.assert_close(normalized, pixel_unshuffle(z, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny-kl", "taesd", "taef2"])
def test_the_encoders_parameters_are_those_that_latents_depend_on(name):
    autoencoder = build_autoencoder(name, seed=0)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    posterior = autoencoder.encode(x)
    parts = [part for part in (posterior.mean, posterior.log_variance) if part is not None]
    sum(part.square().sum() for part in parts).backward()
    reached = {id(parameter) for parameter in autoencoder.parameters() if parameter.grad is not None}
    assert reached == {id(parameter) for parameter in autoencoder.encoder_parameters()}
