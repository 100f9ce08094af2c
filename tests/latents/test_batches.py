"""Training batches follow (seed, step, position in the global batch) alone."""

import threading
from collections.abc import Callable

import pytest
import torch

from eqvae.errors import UserError
from eqvae.latents.batches import training_batches
from eqvae.latents.cache import LatentBatch, LatentCache


@pytest.fixture
def cache(make_cache: Callable[..., LatentCache]) -> LatentCache:
    return make_cache()


def read(cache: LatentCache, num_steps: int = 6, **options: object) -> list[LatentBatch]:
    return list(training_batches(cache, num_steps=num_steps, **{"batch_size": 4, "seed": 1} | options))


def assert_same(one: list[LatentBatch], other: list[LatentBatch]) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("latents", "labels", "indices", "mirrored"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_of_one(cache: LatentCache, count: int):
    parts = [read(cache, rank=rank, count=count) for rank in range(count)]
    joined = [
        LatentBatch(**{
            name: torch.cat([getattr(part, name) for part in step])
            for name in ("latents", "labels", "indices", "mirrored")
        })
        for step in zip(*parts, strict=True)
    ]  # fmt: skip
    assert_same(joined, read(cache))


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_threads_and_resumption_change_nothing(cache: LatentCache, num_threads: int):
    assert_same(read(cache, first_step=2, num_steps=4, num_threads=num_threads), read(cache)[2:])


def test_epochs_are_permutations(cache: LatentCache):
    visited = torch.cat([batch.indices for batch in read(cache, num_steps=10)]).tolist()
    epochs = [tuple(visited[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_a_batch_larger_than_the_cache(cache: LatentCache):
    (batch,) = read(cache, num_steps=1, batch_size=25)
    assert sorted(batch.indices[:10].tolist()) == list(range(10))
    assert len(batch.latents) == 25


def test_seeds_differ_and_positions_have_noise_of_their_own(cache: LatentCache):
    one, other = read(cache), read(cache, seed=2)
    assert not torch.equal(one[0].latents, other[0].latents)
    (batch,) = read(cache, num_steps=1, batch_size=40, flip=False)
    same_image = batch.latents[batch.indices == 3]
    assert len(same_image) == 4
    assert len({latent.numpy().tobytes() for latent in same_image}) == 4


def test_half_of_the_images_are_mirrored(cache: LatentCache):
    mirrored = torch.cat([batch.mirrored for batch in read(cache, num_steps=40, batch_size=50)])
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert not any(batch.mirrored.any() for batch in read(cache, flip=False))


def test_without_flips_and_samples_the_mean_is_read(cache: LatentCache):
    for batch in read(cache, flip=False, sample=False):
        assert torch.equal(batch.latents, cache.read(batch.indices).latents)
    means, samples = read(cache, sample=False), read(cache)
    for mean, sample in zip(means, samples, strict=True):  # neither image nor flip depends on the noise
        assert torch.equal(mean.indices, sample.indices)
        assert torch.equal(mean.mirrored, sample.mirrored)
        assert not torch.equal(mean.latents, sample.latents)


def test_leaving_early(cache: LatentCache):
    batches = training_batches(cache, batch_size=4, seed=0, num_steps=10**9)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("latents")]


def test_a_batch_that_does_not_divide(cache: LatentCache):
    with pytest.raises(UserError, match="--batch-size 4 can't be split over 3 processes"):
        read(cache, count=3)


def test_flips_need_mirror_images(make_cache: Callable[..., LatentCache]):
    cache = make_cache("plain", mirror=False)
    with pytest.raises(UserError, match="holds no mirror images"):
        read(cache)
    assert len(read(cache, flip=False)) == 6
