"""Caches of several shapes: which image has which, batches of one shape, resumed, lengthened, read by processes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eqvae.artifacts.files import read_json, write_json
from eqvae.errors import UserError
from eqvae.images import adm_crop, open_images, to_images
from eqvae.latents.batches import training_batches
from eqvae.latents.cache import LatentCache
from eqvae.latents.index import read_index
from eqvae.runs.encode import EncodeConfig, encode

WIDE = 4
"""Every so many pictures one is wide; the others are squares."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eleven pictures of two aspects, in two classes."""
    random = np.random.default_rng(0)
    for index in range(11):
        size = (20, 40, 3) if index % WIDE == 0 else (24, 24, 3)
        path = tmp_path / "data" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def cache(make_cache: Callable[..., LatentCache]) -> LatentCache:
    """Buckets of about 32 x 32 px, in shards of 4."""
    return make_cache(aspect_buckets=True, image_size=32)


def encoded(cache: LatentCache, autoencoder, index: int) -> torch.Tensor:
    """The posterior mean of one image of the cache, computed anew."""
    place = int(cache.source_indices()[index])
    height, width = cache.read(torch.tensor([index])).latents.shape[-2:]
    crop = adm_crop(open_images(cache.index.data).read(place), (4 * height, 4 * width))
    with torch.inference_mode():
        return autoencoder.encode(to_images([crop])).mean


def test_the_index_names_the_shapes(cache, small_autoencoder):
    shapes = {(shape.height, shape.width): shape.num_images for shape in cache.shapes}
    assert shapes == {(8, 8): 8, (6, 10): 3}
    assert cache.latent_shape == (4, 8, 8)
    assert (cache.index.version, cache.index.image_size_px, len(cache)) == (2, 32, 11)
    assert sorted(cache.source_indices().tolist()) == list(range(11))
    for index in (0, 3, 10):
        found = cache.normalization.denormalize(cache.read(torch.tensor([index])).latents)
        torch.testing.assert_close(found, encoded(cache, small_autoencoder, index), rtol=1e-4, atol=1e-5)
    cache.verify()
    labels, paths = cache.labels(), cache.source_indices()
    source = open_images(cache.index.data)
    assert labels is not None
    assert labels.tolist() == [source.class_of(index) for index in paths.tolist()]


def test_one_square_size_is_written_as_ever(make_cache):
    cache = make_cache()
    content = read_json(cache.folder / "index.json")
    assert content["version"] == 1
    assert "shapes" not in content
    assert "shape" not in content["shards"][0]
    assert {"version": 1, "first_visited": 4, "num_visited": 4, "image_size_px": 16}.items() <= cache._shards[
        1
    ].note.items()
    assert [cache.members(0).tolist(), len(cache.shapes)] == [list(range(11)), 1]


def test_shapes_are_not_read_together(cache):
    with pytest.raises(ValueError, match="several shapes"):
        cache.read(torch.tensor([int(cache.members(0)[0]), int(cache.members(1)[0])]))


@pytest.mark.parametrize("sample", [True, False])
def test_batches_are_of_one_shape(cache, sample):
    whole = list(training_batches(cache, batch_size=4, seed=3, num_steps=11, sample=sample))
    counts = Counter(tuple(batch.latents.shape[-2:]) for batch in whole)
    assert counts == {(shape.height, shape.width): shape.num_images for shape in cache.shapes}
    resumed = list(training_batches(cache, batch_size=4, seed=3, first_step=7, num_steps=4, sample=sample))
    for one, again in zip(whole[7:], resumed, strict=True):
        assert one.latents.equal(again.latents)
    parts = [list(training_batches(cache, batch_size=4, seed=3, num_steps=11, sample=sample, rank=rank, count=2))
             for rank in range(2)]  # fmt: skip
    for one, first, second in zip(whole, *parts, strict=True):
        assert one.latents.equal(torch.cat([first.latents, second.latents]))
        assert one.mirrored.equal(torch.cat([first.mirrored, second.mirrored]))


def test_resuming_and_lengthening(cache, config_for, small_autoencoder, tmp_path):
    config = config_for(tmp_path / "longer", aspect_buckets=True, image_size=32, num_images=6)
    encode(config, small_autoencoder)
    (tmp_path / "longer" / "shard-00001.safetensors").unlink()
    encode(replace(config, num_images=11), small_autoencoder)
    longer = LatentCache.open(tmp_path / "longer")
    longer.verify()
    for number in range(len(cache.index.shards)):
        name = f"shard-{number:05}.safetensors"
        assert (cache.folder / name).read_bytes() == (longer.folder / name).read_bytes()
    for name, other in (("aspect_buckets", False), ("image_size", 64)):
        with pytest.raises(UserError, match=f"holds a latent cache with --{name.replace('_', '-')}"):
            encode(replace(config, num_images=11, **{name: other}), small_autoencoder)


def test_several_resolutions_and_rectangles(make_cache):
    cache = make_cache("several", image_size="16,24,8x16")
    shapes = [(shape.height, shape.width, shape.num_images) for shape in cache.shapes]
    assert shapes == [(4, 4, 4), (6, 6, 4), (2, 4, 3)]  # of one aspect in turn, and the wide ones
    rectangle = make_cache("rectangle", image_size="12x16")
    assert (rectangle.latent_shape, rectangle.index.image_size_px) == ((4, 3, 4), 12)
    assert str(rectangle.index.image_size()) == "12x16"
    with pytest.raises(UserError, match=r"12x18 is not divisible by the stride 4.*Use 16 or 20, for example, for 18"):
        make_cache("odd", image_size="12x18")


def test_a_shape_that_is_all_broken(config_for, small_autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr("eqvae.images.loader.MAX_BROKEN_PERCENT", 50)
    config: EncodeConfig = config_for(tmp_path / "cache", aspect_buckets=True, image_size=32)
    read = open_images(config.data).__class__.read

    def broken(self, index):
        image = read(self, index)
        return decode_nothing(self, index) if image.width != image.height else image

    monkeypatch.setattr("eqvae.images.sources.ImageSource.read", broken)
    encode(config, small_autoencoder)
    cache = LatentCache.open(config.out)
    assert [shape.num_images for shape in cache.shapes if shape.num_images] == [8]
    assert {batch.latents.shape for batch in training_batches(cache, batch_size=2, seed=0, num_steps=9)} == {
        (2, 4, 8, 8)
    }


def decode_nothing(source, index):
    from eqvae.images.decoding import decode_image

    return decode_image(b"", source.label(index))


@pytest.mark.parametrize(
    ("field", "value"),
    [("shapes", [{"height": 8, "width": 8, "num_images": 11}]), ("latent_width", 5),
     ("shapes", [{"height": 8, "width": 8, "num_images": 8}, {"height": 0, "width": 10, "num_images": 3}])],
)  # fmt: skip
def test_a_damaged_index(cache, field, value):
    path = cache.folder / "index.json"
    write_json(path, read_json(path) | {field: value})
    with pytest.raises(UserError, match="is damaged"):
        read_index(cache.folder)
