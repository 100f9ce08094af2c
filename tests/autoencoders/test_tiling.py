"""Pictures coded in tiles: the whole where a network sees its neighbourhood, nearly so elsewhere, in bounded memory."""

import pytest
import torch
from torch import Tensor

from eqvae import in_tiles
from eqvae.autoencoders import Autoencoder, build_autoencoder
from eqvae.autoencoders.families import TinyAutoencoder
from eqvae.autoencoders.tiling import _spans
from eqvae.errors import UserError

ONE_STEP = 2 / 255
"""Of 8 bits, where images are in [-1, 1]."""


def picture(height: int, width: int, num: int = 1) -> Tensor:
    """A smooth random picture."""
    coarse = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    return 2 * torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) - 1


@pytest.fixture
def convolutional() -> TinyAutoencoder:
    """TAESD's architecture at two levels: convolutions alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {
            "encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "decoder_block_out_channels": (8, 8),
            "num_decoder_blocks": (1, 1), "latent_channels": 4,
        }  # fmt: skip
        return TinyAutoencoder.build("AutoencoderTiny", config, name="convolutional").eval()


@torch.inference_mode()
def seams(autoencoder: Autoencoder, x: Tensor, tile_px: int) -> tuple[float, float]:
    """The largest differences of latents, and of the same latents' pictures, from the untiled ones."""
    z = autoencoder.encode(x).mean
    image = autoencoder.decode(z)
    with in_tiles(autoencoder, tile_px):
        tiled = autoencoder.encode(x)
        assert tiled.mean.shape == z.shape
        return float((tiled.mean - z).abs().max()), float((autoencoder.decode(z) - image).abs().max())


@pytest.mark.parametrize(("height", "width"), [(128, 128), (48, 132), (130, 64), (64, 64)])
def test_tiles_of_a_convolutional_network_are_the_whole(convolutional, height, width):
    of_latents, of_pictures = seams(convolutional, picture(height, width, num=2), 64)
    assert of_latents < 1e-4
    assert of_pictures < 1e-4 < ONE_STEP


@pytest.mark.parametrize("tile_px", [28, 64])
def test_tiles_of_other_networks(small_autoencoder, averaging_autoencoder, small_discrete_autoencoder, tile_px):
    x = picture(52, 100)
    for autoencoder in (small_autoencoder, small_discrete_autoencoder):
        assert max(seams(autoencoder, x, tile_px)) < 1e-4
    assert max(seams(averaging_autoencoder, picture(64, 96), 32)) < 1e-6


def test_networks_see_tiles_only(convolutional):
    seen, encode = [], convolutional.model.encoder.forward
    convolutional.model.encoder.forward = lambda x: seen.append(tuple(x.shape[-2:])) or encode(x)
    with torch.inference_mode(), in_tiles(convolutional, 48):
        convolutional.encode(picture(200, 96))
    assert set(seen) == {(48, 48)}


def test_tiles_are_left_with_the_context(convolutional):
    with in_tiles(convolutional, 16):
        assert "encode" in convolutional.__dict__
    assert not {"encode", "decode"} & convolutional.__dict__.keys()
    with in_tiles(convolutional, None):
        assert "encode" not in convolutional.__dict__
    own = convolutional.encode
    convolutional.encode = lambda x: own(x)  # compiled, say
    wrapper = convolutional.encode
    with in_tiles(convolutional, 16), in_tiles(convolutional, 16):
        assert convolutional.encode is not wrapper
    assert convolutional.encode is wrapper


def test_a_network_that_sees_everything_is_blended(capsys):
    autoencoder = build_autoencoder("tiny-kl", seed=0)
    x = picture(96, 160)
    of_latents, _ = seams(autoencoder, x, 64)
    assert "the encoder sees all of a tile of 64 px: blended tiles differ from the whole" in capsys.readouterr().err
    assert 0 < of_latents < float("inf")
    with torch.inference_mode(), in_tiles(autoencoder, 64):
        tiled = autoencoder.decode(autoencoder.encode(x).mean)
    jumps = (tiled[..., 1:] - tiled[..., :-1]).abs().amax((0, 1, 2))
    whole = autoencoder.decode(autoencoder.encode(x).mean).detach()
    of_whole = (whole[..., 1:] - whole[..., :-1]).abs().amax((0, 1, 2))
    assert jumps.max() < 1.5 * of_whole.max()  # no seam stands out
    with torch.inference_mode(), in_tiles(autoencoder, 160):
        assert torch.equal(autoencoder.encode(x).mean, autoencoder.encode(x).mode())  # one tile is the whole


@pytest.mark.parametrize(("length", "tile", "reach"), [(100, 16, 3), (17, 16, 7), (16, 16, 3), (5, 16, 3), (40, 4, 1)])
def test_spans_keep_every_cell_once(length, tile, reach):
    spans = _spans(length, tile, reach)
    assert [cell for span in spans for cell in range(span.kept_first, span.kept_end)] == list(range(length))
    for span in spans:
        assert span.end - span.first == min(tile, length)
        assert span.first == 0 or span.kept_first - span.first >= reach
        assert span.end == length or span.end - span.kept_end >= reach


@pytest.mark.parametrize("tile_px", [0, 4, 66, -8])
def test_a_tile_that_is_none(small_autoencoder, tile_px):
    with (
        pytest.raises(UserError, match=f"--tile {tile_px} is no multiple of the stride 4"),
        in_tiles(small_autoencoder, tile_px),
    ):
        pass
