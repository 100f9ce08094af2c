"""The TAESD format and FLUX.2's pooled variant, against a plain nn.Sequential built here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eqvae.autoencoders import build_autoencoder, load_autoencoder
from eqvae.autoencoders.tiny import PooledAutoencoderTiny
from eqvae.errors import UserError


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3.0) * 3.0


class Block(nn.Module):
    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        convs = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(), nn.Conv2d(256, 64, 1, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def down() -> nn.Module:
    return nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)


def up() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]


def blocks(pooled: bool = False) -> list[nn.Module]:
    return [Block(pooled) for _ in range(3)]


def reference(latent_channels: int, *, pooled: bool) -> tuple[nn.Sequential, nn.Sequential]:
    encoder = nn.Sequential(
        *[nn.Conv2d(3, 64, 3, padding=1), Block(), down(), *blocks(), down(), *blocks(), down(), *blocks(pooled)],
        nn.Conv2d(64, latent_channels, 3, padding=1),
    )
    decoder = nn.Sequential(
        *[Clamp(), nn.Conv2d(latent_channels, 64, 3, padding=1), nn.ReLU()],
        *[*blocks(pooled), *up(), *blocks(), *up(), *blocks(), *up(), Block()],
        nn.Conv2d(64, 3, 3, padding=1),
    )
    return encoder, decoder


def check_parity(folder: Path, encoder: nn.Module, decoder: nn.Module, images: Tensor) -> None:
    autoencoder = load_autoencoder(str(folder))
    z = autoencoder.encode(images).mean
    torch.testing.assert_close(z, encoder((images + 1.0) / 2.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(autoencoder.decode(z), decoder(z) * 2.0 - 1.0, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_taef2_is_the_authors_own(taef2: Path, images: Tensor) -> None:
    pair = reference(32, pooled=True)
    for part, name in zip(pair, ("encoder", "decoder"), strict=True):
        state = torch.load(taef2 / f"taef2_{name}.pth", weights_only=True)
        part.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True)
    check_parity(taef2, *pair, images)
    autoencoder = load_autoencoder(str(taef2))
    assert (autoencoder.stride, autoencoder.latent_channels) == (8, 32)
    assert all(parameter.dtype == torch.float32 for parameter in autoencoder.parameters())


@pytest.mark.parametrize(("latent_channels", "pooled"), [(4, False), (16, False), (32, True)])
@torch.no_grad()
def test_variant_and_channels_are_read_off_the_shapes(
    latent_channels: int, pooled: bool, images: Tensor, tmp_path: Path
) -> None:
    pair = reference(latent_channels, pooled=pooled)
    for part, name in zip(pair, ("encoder", "decoder"), strict=True):
        save_file(part.state_dict(), tmp_path / f"x_{name}.safetensors")
    check_parity(tmp_path, *pair, images)
    check_parity(tmp_path / "x_encoder.safetensors", *pair, images)


@torch.no_grad()
def test_pooled_variant_survives_saving(images: Tensor, tmp_path: Path) -> None:
    autoencoder = build_autoencoder("taef2", seed=0)
    autoencoder.save(tmp_path)
    theirs = PooledAutoencoderTiny.from_pretrained(tmp_path)
    assert torch.equal(theirs.encode(images).latents, autoencoder.encode(images).mean)
    assert load_autoencoder(str(tmp_path)).fingerprint() == autoencoder.fingerprint()
    theirs.save_pretrained(tmp_path / "again")
    assert load_autoencoder(str(tmp_path / "again")).fingerprint() == autoencoder.fingerprint()


def test_a_lonely_or_ambiguous_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x_encoder.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"x_decoder\.pth' does not exist"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "y_encoder.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"several tiny autoencoders \(x_encoder\.pth, y_encoder\.pth\)"):
        load_autoencoder(str(tmp_path))
