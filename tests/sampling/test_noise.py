"""Noise per image: the same for any batch, standard normal, new at each call."""

import pytest
import torch

from eqvae.sampling.noise import ImageNoise

SHAPE = (4, 8, 8)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_an_images_noise_is_the_same_for_any_batch_size(batch_size):
    whole = ImageNoise(5, range(7), SHAPE)
    expected = [whole.next() for _ in range(3)]
    for start in range(0, 7, batch_size):
        indices = range(start, min(start + batch_size, 7))
        part = ImageNoise(5, indices, SHAPE)
        for drawn in expected:
            assert torch.equal(part.next(), drawn[start : indices.stop])


def test_an_images_noise_is_the_same_in_any_order():
    noise, shuffled = ImageNoise(5, [2, 0, 9], SHAPE).next(), ImageNoise(5, [9, 2, 0], SHAPE).next()
    assert torch.equal(noise, shuffled[[1, 2, 0]])


def test_seeds_images_and_calls_differ():
    noise = ImageNoise(0, [0, 1], SHAPE)
    first, second = noise.next(), noise.next()
    other = ImageNoise(1, [0, 1], SHAPE).next()
    draws = torch.cat([first, second, other]).flatten(1)
    correlations = torch.corrcoef(draws) - torch.eye(6)
    assert correlations.abs().max() < 0.25


def test_noise_is_standard_normal():
    drawn = ImageNoise(0, range(64), (4, 32, 32)).next()
    assert drawn.mean().abs() < 0.01
    assert (drawn.var() - 1.0).abs() < 0.01
    assert drawn.shape == (64, 4, 32, 32)


def test_wider_types_hold_the_same_numbers():
    single, double = ImageNoise(3, [4], SHAPE), ImageNoise(3, [4], SHAPE, dtype=torch.float64)
    drawn = double.next()
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, single.next().double())
