"""Presets say the truth about their architectures; untrained ones are reproducible."""

import subprocess
import sys

import pytest
import torch

from eqvae.autoencoders import PRESETS, build_autoencoder, load_autoencoder
from eqvae.autoencoders.families import find_family
from eqvae.errors import UserError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_architectures_have_the_said_stride_and_channels(name: str) -> None:
    preset = PRESETS[name]
    class_name, config = preset.architecture.class_name, preset.architecture.config
    with torch.device("meta"):
        autoencoder = find_family(class_name, name).build(class_name, config, name=name)
        stride, channels = preset.stride, config["latent_channels"]
        assert (autoencoder.stride, autoencoder.latent_channels) == (stride, channels)
        z = autoencoder.encode(torch.zeros(1, 3, stride, 2 * stride)).mean
        assert z.shape == (1, channels, 1, 2)
        assert autoencoder.decode(z).shape == (1, 3, stride, 2 * stride)


def test_tiny_kl_fits_into_the_package() -> None:
    assert build_autoencoder("tiny-kl", seed=0).num_parameters() <= 2_400_000  # two bytes each


def test_untrained_weights_follow_the_seed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_autoencoder("taesd", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert build_autoencoder("taesd", seed=1).fingerprint() == first.fingerprint()
    assert build_autoencoder("taesd", seed=2).fingerprint() != first.fingerprint()
    named = load_autoencoder("untrained:taesd")
    assert named.name == "untrained:taesd" and not named.training
    assert named.fingerprint() == build_autoencoder("taesd", seed=0).fingerprint()


def test_unfetchable_and_unknown_presets_are_told() -> None:
    with pytest.raises(UserError, match="'untrained:taef2' for random weights"):
        load_autoencoder("taef2")
    with pytest.raises(UserError, match="Did you mean 'taesd'"):
        load_autoencoder("untrained:taesdd")


def test_importing_the_package_does_not_import_diffusers() -> None:
    code = "import sys, eqvae.autoencoders; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
