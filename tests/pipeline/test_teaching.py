"""REPA's teacher: tokens of the very images, on the fly or from a file."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from eqvae.artifacts.files import read_journal
from eqvae.errors import UserError
from eqvae.generators.checkpoints import read_generator
from eqvae.generators.families import find_recipe
from eqvae.latents.cache import LatentCache
from eqvae.latents.teaching import TeacherTokens, read_teacher_tokens, teach, write_teacher_tokens
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig
from eqvae.runs.train_cost import describe_plan
from eqvae.runtime.processes import Processes

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
REPA = {"recipe": "repa-sit-ti-4", "teacher": "efficientnet-lite0"}


def tokens_of(config: TrainConfig) -> TeacherTokens:
    cache, recipe = LatentCache.open(config.latents), find_recipe(config.recipe)
    _, height, width = cache.latent_shape
    return teach(config.repa, cache, (height // recipe.patch_size, width // recipe.patch_size), ALONE).read(ALONE)


def test_tokens_are_the_images(configure, latents: Path):
    taught = tokens_of(configure(**REPA))
    indices, mirrored = torch.tensor([9, 0, 9]), torch.tensor([False, True, True])
    found = taught.tokens(indices, mirrored)
    assert found.shape == (3, 4, taught.channels)  # 8 x 8 cells in patches of 4
    images = taught.images(indices)
    assert images[0].float().mean((1, 2)).argmax() == 2  # image 9 is of class b: blue
    assert images[1].float().mean((1, 2)).argmax() == 0
    alone = taught.teacher(images[1:2].flip(-1))
    assert F.cosine_similarity(found[1:2], alone, dim=-1).min() > 0.99  # bf16
    assert not torch.allclose(found[0], found[2])


def test_cached_tokens_are_those_of_the_fly(configure, latents: Path):
    on_the_fly, cached = tokens_of(configure(**REPA)), tokens_of(configure(**REPA, cache_teacher=True))
    indices, mirrored = torch.tensor([1, 2, 11]), torch.tensor([True, False, True])
    one, other = on_the_fly.tokens(indices, mirrored), cached.tokens(indices, mirrored)
    assert cached.teacher is None
    assert F.cosine_similarity(one, other, dim=-1).min() > 0.99
    (path,) = latents.glob("teacher-efficientnet-lite0-2x2.safetensors")
    written = path.stat().st_mtime_ns
    tokens_of(configure(**REPA, cache_teacher=True))
    assert path.stat().st_mtime_ns == written
    # Another patch size has another grid, and so tokens of its own.
    assert (
        tokens_of(configure(**REPA | {"recipe": "repa-sit-ti-2"}, cache_teacher=True))
        .tokens(indices, mirrored)
        .shape[1]
        == 16
    )


def test_tokens_are_computed_when_all_has_been_checked(configure, data, tmp_path):
    shutil.copytree(configure().latents, tmp_path / "cache", ignore=shutil.ignore_patterns("teacher-*"))
    config = configure(**REPA, cache_teacher=True, latents=tmp_path / "cache", max_steps=1)
    describe_plan(config)
    with pytest.raises(UserError, match="holds no 'eqvae train' run"):
        train(replace(config, out=data))
    assert not list(config.latents.glob("teacher-*"))
    train(config)
    assert list(config.latents.glob("teacher-*"))


def test_other_processes_wait_for_the_first_one_to_compute(configure, tmp_path):
    shutil.copytree(configure().latents, tmp_path / "cache", ignore=shutil.ignore_patterns("teacher-*"))
    config = configure(**REPA, cache_teacher=True, latents=tmp_path / "cache")
    taught = teach(config.repa, LatentCache.open(config.latents), (2, 2), ALONE)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(taught.read, replace(ALONE, rank=1, count=2))
        first = taught.read(replace(ALONE, count=2))
        assert torch.equal(second.result(60).stored["mirrored"], first.stored["mirrored"])


@pytest.mark.parametrize("cached", [False, True])
def test_repa_trains(configure, cached: bool):
    config = configure(**REPA, cache_teacher=cached, max_steps=6, gradient_accumulation_steps=2)
    train(config)
    records = [record for record in read_journal(config.out) if record["kind"] == "train"]
    for record in records:
        assert record["loss"] == pytest.approx(record["mse"] + 0.5 * record["repa"], rel=1e-4)
    assert records[-1]["repa"] < records[0]["repa"]  # towards -1
    generator = read_generator(config.out)
    assert generator.card.interpolant.time_of_data == 0
    assert generator.transformer.state_dict()["projectors.0.4.bias"].shape == (112,)


def test_other_images_are_refused(configure, other_data: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds other images than those.*Name the encoded images with --data"):
        train(configure(**REPA, data=str(other_data)))
    with pytest.raises(UserError, match="no/such"):
        train(configure(**REPA, data="no/such/folder"))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_be_had(configure):
    with pytest.raises(UserError, match="--teacher efficientnet-lite0, which works offline"):
        train(configure(**REPA | {"teacher": "vit_tiny_patch16_224"}))


def _tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_mirrored", [False, True])
def test_the_token_cache_comes_back_in_bfloat16(tmp_path, with_mirrored):
    tokens, mirrored = _tokens(5, 4, 3), _tokens(5, 4, 3, seed=1) if with_mirrored else None
    write_teacher_tokens(tmp_path / "tokens.safetensors", tokens, teacher="t", weights="w", mirrored=mirrored)
    read = read_teacher_tokens(tmp_path / "tokens.safetensors", teacher="t", weights="w", num_images=5)
    assert torch.equal(read["tokens"], tokens.bfloat16())
    assert set(read) == ({"tokens", "mirrored"} if with_mirrored else {"tokens"})


def test_a_cache_of_something_else_is_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    write_teacher_tokens(path, _tokens(5, 4, 3), teacher="dino", weights="first")
    with pytest.raises(UserError, match="tokens of 'dino', not of 'mae'"):
        read_teacher_tokens(path, teacher="mae", weights="first", num_images=5)
    with pytest.raises(UserError, match="tokens of 'dino' with other weights. Remove it"):
        read_teacher_tokens(path, teacher="dino", weights="second", num_images=5)
    with pytest.raises(UserError, match="tokens of 5 images, the cache has 6"):
        read_teacher_tokens(path, teacher="dino", weights="first", num_images=6)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="truncated"):
        read_teacher_tokens(path, teacher="dino", weights="first", num_images=5)
