"""An autoencoder for images of other channels begins as what it was, seen through channels that are all alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.channels import load_with_channels
from eqvae.autoencoders.convert import convert_autoencoder
from eqvae.errors import UserError


@pytest.mark.parametrize("num_channels", [1, 5])
@pytest.mark.parametrize("family", ["small_kl", "small_tiny", "small_dc", "vqgan", "small_flux2"])
@torch.inference_mode()
def test_alike_channels_are_coded_as_grey_was(
    family: str, num_channels: int, images: Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Any = request.getfixturevalue(family)
    model.save_pretrained(tmp_path / "base")
    base = load_autoencoder(str(tmp_path / "base"))
    convert_autoencoder(str(tmp_path / "base"), tmp_path / "new", "diffusers", num_channels=num_channels)
    changed = load_autoencoder(str(tmp_path / "new"))
    assert changed.image_channels == num_channels
    grey = images[:, :1, :32, :32]
    z, before = changed.encode(grey.expand(-1, num_channels, -1, -1)).mean, base.encode(grey.expand(-1, 3, -1, -1)).mean
    assert torch.allclose(z, before, atol=1e-5)
    decoded, mean = changed.decode(z), base.decode(z).mean(1, keepdim=True)
    assert torch.allclose(decoded, mean.expand(-1, num_channels, -1, -1), atol=1e-4)


def test_one_file_says_its_channels_by_its_shapes(attending_kl: Any, tmp_path: Path) -> None:
    attending_kl.save_pretrained(tmp_path / "base")
    convert_autoencoder(str(tmp_path / "base"), tmp_path / "one.safetensors", "ldm", num_channels=1)
    assert load_autoencoder(str(tmp_path / "one.safetensors")).image_channels == 1
    changed: Any = load_with_channels("untrained:taesd", 5).model
    torch.save(changed.encoder.layers.state_dict(), tmp_path / "a_encoder.pth")
    decoder = changed.decoder.layers.state_dict()
    shifted = {f"{int(key.split('.')[0]) + 1}.{key.split('.', 1)[1]}": value for key, value in decoder.items()}
    torch.save(shifted, tmp_path / "a_decoder.pth")
    assert load_autoencoder(str(tmp_path / "a_encoder.pth")).image_channels == 5


def test_untrained_ones_are_drawn_anew() -> None:
    autoencoder = load_with_channels("untrained:tiny-kl-f2", 2)
    first = autoencoder.model.encoder.conv_in.weight  # type: ignore[union-attr]
    assert autoencoder.image_channels == 2
    assert not torch.allclose(first[:, 0], first[:, 1])


@pytest.mark.parametrize(("name", "channels", "what"), [("tiny-kl", 3, "already"), ("tiny-kl", 0, "no number")])
def test_what_is_no_change_is_refused(name: str, channels: int, what: str) -> None:
    with pytest.raises(UserError, match=what):
        load_with_channels(name, channels)
