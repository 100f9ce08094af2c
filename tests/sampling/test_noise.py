"""Noise per image: the same for any batch, standard normal, new at each call. Labels: functions of the index."""

import pytest
import torch

from eqvae.errors import UserError
from eqvae.sampling.noise import ImageNoise, balanced_labels, listed_labels, random_labels

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


def test_any_prefix_is_balanced_but_for_one_image():
    labels = balanced_labels(range(1000), 7)
    for length in (1, 6, 7, 8, 500, 1000):
        counts = torch.bincount(labels[:length], minlength=7)
        assert counts.max() - counts.min() <= 1


def test_labels_depend_on_the_index_alone():
    indices = [12, 3, 7]
    assert balanced_labels(indices, 5).tolist() == [2, 3, 2]
    whole = random_labels(4, range(13), 10)
    assert torch.equal(random_labels(4, indices, 10), whole[indices])
    assert listed_labels(indices, [8, 1], 10).tolist() == [8, 1, 1]


def test_random_labels_are_uniform_and_follow_the_seed():
    labels = random_labels(0, range(2000), 4)
    assert torch.bincount(labels, minlength=4).sub(500).abs().max() < 80
    assert (labels == random_labels(1, range(2000), 4)).double().mean() == pytest.approx(0.25, abs=0.05)


def test_an_unconditional_generator_gets_its_null_class():
    assert balanced_labels(range(3), 0).tolist() == [0, 0, 0]
    assert random_labels(0, range(3), 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("classes", "num_classes", "message"),
    [
        ([], 10, "empty.*0 to 9"),
        ([3, 10], 10, "Class 10 is not one.*0 to 9"),
        ([-1], 10, "Class -1"),
        ([0], 0, "unconditional"),
    ],
)
def test_wrong_lists_are_named(classes, num_classes, message):
    with pytest.raises(UserError, match=message):
        listed_labels(range(4), classes, num_classes)
