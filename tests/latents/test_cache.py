"""The cache gives back what was encoded, normalized exactly, and names what is broken."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqvae.errors import UserError
from eqvae.images import ImageSize, adm_crop, open_images, to_images
from eqvae.latents.cache import LatentCache
from eqvae.latents.index import INDEX
from eqvae.latents.shards import Shard, write_shard
from eqvae.latents.writing import Coding, Recipe, collect_index, finish_shard

MakeCache = Callable[..., LatentCache]
ALL = torch.arange(10)
DESCRIPTORS = Path("/proc/self/fd")
MIRRORED = torch.ones(10, dtype=torch.bool)


@pytest.fixture
def images(data: Path) -> Tensor:
    """The images as the encoder sees them."""
    source = open_images(str(data))
    return to_images([adm_crop(source.read(index), 16) for index in range(len(source))])


def raw(cache: LatentCache, mirrored: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    return cache.normalization.denormalize(cache.read(torch.arange(len(cache)), mirrored=mirrored, noise=noise).latents)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# What was encoded ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_moments_of_images_and_mirror_images_come_back(make_cache: MakeCache, images, small_autoencoder):
    cache = make_cache()
    noise = torch.randn(10, 4, 4, 4)
    posterior, flipped = small_autoencoder.encode(images), small_autoencoder.encode(images.flip(-1))
    close(raw(cache), posterior.mean)
    close(raw(cache, MIRRORED), flipped.mean)
    close(raw(cache, noise=noise), posterior.sample(noise))
    close(raw(cache, MIRRORED, noise), flipped.sample(noise))


def test_the_order_of_asking_is_kept(make_cache: MakeCache):
    cache = make_cache()
    noise, asked = torch.randn(10, 4, 4, 4), torch.tensor([9, 0, 4, 4, 3, 7])
    mirrored = torch.tensor([True, False, True, False, True, False])
    batch = cache.read(asked, mirrored=mirrored, noise=noise[asked])
    whole = [cache.read(ALL, mirrored=flag & MIRRORED, noise=noise) for flag in (False, True)]
    for row, (index, flag) in enumerate(zip(asked.tolist(), mirrored.tolist(), strict=True)):
        assert torch.equal(batch.latents[row], whole[flag].latents[index])
    assert torch.equal(batch.labels, whole[0].labels[asked])
    assert torch.equal(batch.indices, asked)
    assert torch.equal(batch.mirrored, mirrored)


def test_labels_and_places_in_the_source(make_cache: MakeCache, data: Path):
    cache, source = make_cache(), open_images(str(data))
    assert cache.index.class_names == ("a", "b")
    assert cache.index.num_classes == 2
    assert cache.labels().tolist() == [0] * 5 + [1] * 5 == [source.class_of(index) for index in range(10)]
    assert cache.source_indices().tolist() == list(range(10))


def test_without_labels(make_cache: MakeCache):
    cache = make_cache(label_column="none")
    assert cache.index.num_classes is None
    assert cache.labels() is None
    assert cache.read(ALL).labels is None


def test_a_deterministic_encoder_has_no_width(make_cache: MakeCache, averaging_autoencoder, images):
    cache = make_cache(autoencoder=averaging_autoencoder)
    assert not cache.index.has_std
    assert set(Shard(cache.folder / "shard-00000.safetensors").places) == {
        "mean", "mean_mirrored", "labels", "source_indices"
    }  # fmt: skip
    close(raw(cache, noise=torch.randn(10, 3, 2, 2)), torch.nn.functional.avg_pool2d(images, 8))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_the_bytes(make_cache: MakeCache, dtype: str, tolerance: float):
    full, half = make_cache(), make_cache(dtype, dtype=dtype)
    close(raw(half), raw(full), tolerance)
    stored = {name: (place.dtype, place.shape) for name, place in half._shards[0].places.items()}
    assert stored["std_mirrored"] == (dtype, (4, 4, 4, 4))


# Normalization ------------------------------------------------------------------------------------------------------


def test_normalized_samples_have_mean_zero_and_variance_one(make_cache: MakeCache):
    cache = make_cache()
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(400):
        for mirrored in (MIRRORED, ~MIRRORED):
            noise = torch.randn(10, 4, 4, 4, generator=generator)
            samples.append(cache.read(ALL, mirrored=mirrored, noise=noise).latents)
    values = torch.cat(samples).transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 0.01
    assert (values.std(1) - 1).abs().max() < 0.01


def test_samples_follow_the_posterior(make_cache: MakeCache):
    cache = make_cache()
    noise = torch.randn(4000, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    samples = cache.normalization.denormalize(cache.read(torch.full((4000,), 6), noise=noise).latents)
    shard = Shard(cache.folder / "shard-00001.safetensors")
    mean, std = torch.tensor(shard.array("mean")[2]), torch.tensor(shard.array("std")[2])
    assert ((samples.mean(0) - mean) / std).abs().max() < 5 / 4000**0.5
    assert (samples.std(0) / std - 1).abs().max() < 0.06


def test_measured_and_fixed_normalization(make_cache: MakeCache):
    cache = make_cache()
    shards = [Shard(cache.folder / entry.file) for entry in cache.index.shards]
    z = torch.cat([torch.tensor(shard.array("mean")) for shard in shards])
    shift, scale = torch.tensor(cache.index.statistics.mean), torch.tensor(cache.index.statistics.std)
    expected = (z - shift[:, None, None]) / scale[:, None, None]
    assert torch.equal(cache.read(ALL).latents, expected)
    assert torch.equal(cache.normalization.normalize(z), expected)
    close(cache.normalization.denormalize(expected), z)
    fixed = LatentCache.open(cache.folder, normalization="fixed:0.18215")
    close(fixed.read(ALL).latents, z * 0.18215)
    close(fixed.normalization.denormalize(z * 0.18215), z)


@pytest.mark.parametrize("name", ["fixed", "fixed:", "fixed:-1", "fixed:nan", "mesured"])
def test_an_unknown_normalization(make_cache: MakeCache, name: str):
    cache = make_cache()
    with pytest.raises(UserError, match=r"measured|fixed:0\.18215"):
        LatentCache.open(cache.folder, normalization=name)


# Tokens -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_tokens(tmp_path: Path, dtype: str):
    recipe = token_recipe(dtype)
    tokens = torch.randint(0, 512, (2, 5, 4, 4))
    for number in range(2):
        rows = slice(3 * number, min(3 * number + 3, 5))
        kept = {"tokens": tokens[0, rows], "tokens_mirrored": tokens[1, rows]}
        finish_shard(
            tmp_path, recipe, number, kept, source_indices=list(recipe.shards[number].visited), labels=None, broken=[]
        )
    collect_index(tmp_path, recipe).write(tmp_path)
    cache = LatentCache.open(tmp_path)
    cache.verify()
    batch = cache.read_tokens(torch.tensor([4, 0]), mirrored=torch.tensor([True, False]))
    assert torch.equal(batch.latents, torch.stack([tokens[1, 4], tokens[0, 0]]))
    assert batch.labels is None
    assert Shard(tmp_path / "shard-00000.safetensors").places["tokens"].dtype == dtype
    with pytest.raises(UserError, match="holds tokens, not moments"):
        cache.read(torch.tensor([0]))


def test_tokens_outside_the_codebook(tmp_path: Path):
    kept = {"tokens": torch.full((3, 4, 4), 512), "tokens_mirrored": torch.zeros(3, 4, 4, dtype=torch.int64)}
    with pytest.raises(UserError, match="outside a codebook of 512"):
        finish_shard(tmp_path, token_recipe("int16"), 0, kept, source_indices=range(3), labels=None, broken=[])
    assert not list(tmp_path.iterdir())


def token_recipe(dtype: str) -> Recipe:
    return Recipe(
        visited_by_size=((ImageSize(64, 64), range(5)),),
        coding=Coding(kind="tokens", dtype=dtype, codebook_size=512), stride=16, latent_channels=256,
        autoencoder="vq", fingerprint="0", encoder_fingerprint="e", data="images", data_fingerprint="1",
        class_names=None, mirror=True, precision="fp32", shard_size=3,
        command="eqvae encode vq --data images",
    )  # fmt: skip


# Workers ------------------------------------------------------------------------------------------------------------


def test_a_cache_pickles_without_its_files(make_cache: MakeCache):
    cache = make_cache()
    before = cache.read(ALL).latents
    content = pickle.dumps(cache)
    assert len(content) < 20_000
    assert torch.equal(pickle.loads(content).read(ALL).latents, before)


# Faults -------------------------------------------------------------------------------------------------------------


def test_another_encoder_may_not_decode(make_cache: MakeCache, small_autoencoder):
    index = make_cache().index
    own = {"fingerprint": index.fingerprint, "encoder_fingerprint": index.encoder_fingerprint}
    assert small_autoencoder.check_decodes("Made by", made_by="small", **own) == index.fingerprint
    other = type(small_autoencoder)(seed=1)
    with pytest.raises(UserError, match="Made by 'small' .* and .* has other weights"):
        other.check_decodes("Made by", made_by="small", **own)


def test_a_missing_shard_is_named_with_the_command_that_rebuilds_it(make_cache: MakeCache, data: Path):
    cache = make_cache()
    (cache.folder / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        LatentCache.open(cache.folder)
    line = str(caught.value)
    assert "shard-00001.safetensors' is missing" in line
    assert f"eqvae encode small --data {data} --image-size 16 --batch-size 3 --shard-size 4" in line
    assert line.endswith(f"--dtype float32 --precision fp32 --out {cache.folder}")


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_a_truncated_shard(make_cache: MakeCache, kept_bytes: int):
    path = make_cache().folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match=r"shard-00002\.safetensors' (is truncated|is damaged|has).*Rebuild it: eqvae"):
        LatentCache.open(path.parent)


def test_a_flipped_bit_is_found_by_verifying(make_cache: MakeCache):
    cache = make_cache()
    cache.verify()
    path = cache.folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001.*its digest differs"):
        LatentCache.open(cache.folder).verify()


def test_a_shard_of_another_cache(make_cache: MakeCache, small_autoencoder):
    cache, other = make_cache(), make_cache("other", type(small_autoencoder)(seed=1))
    name = "shard-00000.safetensors"
    (cache.folder / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(UserError, match="is not the one that the index names|bytes instead of"):
        LatentCache.open(cache.folder)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range(make_cache: MakeCache, label: int):
    cache = make_cache()
    path = cache.folder / "shard-00000.safetensors"
    shard = Shard(path)
    tensors = {name: torch.tensor(shard.array(name)) for name in shard.places}
    tensors["labels"][1] = label
    write_shard(path, tensors, {name: value for name, value in shard.note.items() if name != "sha256"})
    first = replace(cache.index.shards[0], sha256=Shard(path).note["sha256"], num_bytes=path.stat().st_size)
    replace(cache.index, shards=(first, *cache.index.shards[1:])).write(cache.folder)
    cache = LatentCache.open(cache.folder)
    expected = f"shard-00000.safetensors' holds label {label}, out of range for 2 classes"
    with pytest.raises(UserError, match=expected):
        cache.read(ALL)
    with pytest.raises(UserError, match=expected):
        cache.verify()


def test_an_index_of_a_newer_version(make_cache: MakeCache):
    path = make_cache().folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3, "eqvae_version": "9.0", "novelty": 1}))
    with pytest.raises(UserError, match=r"has format 3, .* up to 2\. Upgrade eqvae .*9\.0"):
        LatentCache.open(path.parent)


@pytest.mark.parametrize(
    "change",
    [{"num_images": 11}, {"kind": "pixels"}, {"dtype": "float8"}, {"statistics": None}, {"latent_channels": -4},
     {"latent_channels": "4"}, {"shards": []}, {"unknown": 1}, {"class_names": 3}],
)  # fmt: skip
def test_a_damaged_index(make_cache: MakeCache, change: dict):
    path = make_cache().folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"index\.json' is damaged"):
        LatentCache.open(path.parent)


def test_folders_that_are_no_cache(make_cache: MakeCache, tmp_path: Path, data: Path):
    with pytest.raises(UserError, match="does not exist"):
        LatentCache.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no latent cache"):
        LatentCache.open(data)
    folder = make_cache().folder
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=r"has not finished\. The same 'eqvae encode' command goes on"):
        LatentCache.open(folder)


def test_mirror_images_that_are_not_there(make_cache: MakeCache):
    cache = make_cache(mirror=False)
    assert not cache.index.has_mirrored
    cache.read(ALL)
    with pytest.raises(UserError, match="holds no mirror images"):
        cache.read(ALL, mirrored=MIRRORED)


@pytest.mark.parametrize("index", [-1, 10])
def test_images_that_are_not_there(make_cache: MakeCache, index: int):
    with pytest.raises(IndexError):
        make_cache().read(torch.tensor([0, index]))


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="the system does not list them")
def test_shards_keep_no_descriptors(make_cache: MakeCache):
    cache = make_cache(shard_size=1)
    before = len(list(DESCRIPTORS.iterdir()))
    cache.read(ALL)
    cache.labels()
    assert len(list(DESCRIPTORS.iterdir())) == before


def test_a_folder_whose_name_is_no_text(make_cache: MakeCache):
    cache = make_cache()
    plain = cache.read(ALL).latents
    moved = cache.folder.with_name("caf\udce9")
    cache.folder.rename(moved)
    assert torch.equal(LatentCache.open(moved).read(ALL).latents, plain)
