"""Caches of discrete autoencoders: tokens of images and of their mirror images."""

from collections.abc import Callable

import pytest
import torch

from eqvae.artifacts.files import read_json
from eqvae.errors import UserError
from eqvae.images import adm_crop, open_images, to_images
from eqvae.latents.cache import LatentCache
from eqvae.latents.writing import coding_of


@pytest.fixture
def cache(make_cache: Callable[..., LatentCache], small_discrete_autoencoder) -> LatentCache:
    return make_cache(autoencoder=small_discrete_autoencoder, mirror=True)


def test_tokens_are_those_of_images_and_mirror_images(cache, data, small_discrete_autoencoder):
    source = open_images(str(data))
    x = to_images([adm_crop(source.read(index), 16) for index in range(10)])
    with torch.inference_mode():
        tokens = [small_discrete_autoencoder.quantize(small_discrete_autoencoder.encode(y).mean).tokens
                  for y in (x, x.flip(-1))]  # fmt: skip
    everything = torch.arange(10)
    plain = cache.read_tokens(everything, mirrored=torch.zeros(10, dtype=torch.bool))
    mirrored = cache.read_tokens(everything, mirrored=torch.ones(10, dtype=torch.bool))
    assert torch.equal(plain.latents, tokens[0])
    assert torch.equal(mirrored.latents, tokens[1])
    assert not torch.equal(plain.latents.flip(-1), mirrored.latents)  # encoders do not commute with flips
    assert torch.equal(plain.labels, torch.tensor([source.class_of(index) for index in range(10)]))


@torch.no_grad()
def test_cached_tokens_decode_as_images_do(cache, data, small_discrete_autoencoder):
    source = open_images(str(data))
    x = to_images([adm_crop(source.read(index), 16) for index in (2, 5)])
    tokens = cache.read_tokens(torch.tensor([2, 5]), mirrored=torch.zeros(2, dtype=torch.bool)).latents
    z = small_discrete_autoencoder.encode(x).mean
    assert torch.equal(small_discrete_autoencoder.decode_tokens(tokens), small_discrete_autoencoder.decode(z))


def test_the_index_describes_tokens(cache, small_discrete_autoencoder):
    index = cache.index
    assert (index.kind, index.codebook_size, index.dtype, index.statistics) == ("tokens", 24, "int16", None)
    assert (index.stride, index.latent_channels, index.latent_height, index.has_std) == (4, 4, 4, False)
    assert index.fingerprint == small_discrete_autoencoder.fingerprint()
    assert not [name for name in read_json(cache.folder / "metrics.json") if name.startswith("latent")]
    cache.verify()


def test_tokens_are_no_moments(cache):
    with pytest.raises(UserError, match="tokens"):
        cache.read(torch.arange(2))


@pytest.mark.parametrize(("num_codes", "dtype"), [(2**15, "int16"), (2**15 + 1, "int32")])
def test_large_codebooks_get_a_wider_type(small_discrete_autoencoder, num_codes, dtype):
    small_discrete_autoencoder.codes = torch.nn.Parameter(torch.zeros(num_codes, 4))
    assert coding_of(small_discrete_autoencoder, "float16").dtype == dtype
