"""Kernel distance: closed forms, unbiasedness, torch-fidelity on the same subsets."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from eqvae.metrics.comparison import kernel_distance, squared_mmd


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_two_points_against_two_points_by_hand():
    """d = 1: k(1, 1) = 8, k(0, .) = 1, so the mean within is 8 and 1, and 1 between."""
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 1)
    assert squared_mmd(ones, zeros) == pytest.approx(8.0 + 1.0 - 2.0)
    assert squared_mmd(zeros, ones) == pytest.approx(7.0)
    assert squared_mmd(zeros, zeros) == 0.0


def test_pairs_of_a_point_with_itself_are_left_out():
    """k(1, -1) = 0, though k(1, 1) = k(-1, -1) = 8; k(0, .) = 1. Sets may differ in size."""
    x, y = torch.tensor([[1.0], [-1.0]]), torch.zeros(3, 1)
    assert squared_mmd(x, y) == pytest.approx(0.0 + 1.0 - 2.0)


def test_sets_of_one_distribution_are_at_distance_zero_on_average():
    values = [squared_mmd(normal(40, 8, seed=index), normal(40, 8, seed=1000 + index)) for index in range(100)]
    assert abs(np.mean(values)) < 3.0 * np.std(values) / 10.0
    assert min(values) < 0.0 < max(values)


def test_parity_with_torch_fidelity_on_whole_sets():
    x, y = normal(60, 32).abs(), 1.2 * normal(60, 32, seed=1).abs()
    expected = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=60, verbose=False)
    found = kernel_distance(reference=x, samples=y)
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert (found.std, found.num_subsets, found.subset_size) == (0.0, 1, 60)


def test_parity_with_torch_fidelity_on_the_same_subsets():
    x, y = normal(90, 32).abs(), 1.2 * normal(70, 32, seed=1).abs()
    options = {"kid_subsets": 6, "kid_subset_size": 25, "rng_seed": 3, "verbose": False}
    expected = kid_features_to_metric(x.double(), y.double(), **options)
    generator = np.random.RandomState(3)
    values = []
    for _ in range(6):
        rows = [torch.from_numpy(generator.choice(len(each), 25, replace=False)) for each in (x, y)]
        values.append(squared_mmd(x[rows[0]], y[rows[1]]))
    assert np.mean(values) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert np.std(values) == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-8)


def test_subsets_are_drawn_from_the_seed():
    x, y = normal(200, 8), normal(150, 8, seed=1) + 0.3
    options = {"num_subsets": 20, "subset_size": 50}
    first = kernel_distance(reference=x, samples=y, **options)
    assert first == kernel_distance(reference=x, samples=y, **options)
    assert (first.num_subsets, first.subset_size) == (20, 50) and first.std > 0.0
    other = kernel_distance(reference=x, samples=y, seed=1, **options)
    assert other.value != first.value
    assert other.value == pytest.approx(first.value, abs=first.std)
    assert first.value == pytest.approx(squared_mmd(x, y), abs=first.std)


def test_smaller_sets_shrink_the_subsets():
    found = kernel_distance(reference=normal(300, 4), samples=normal(30, 4, seed=1), num_subsets=5)
    assert (found.num_subsets, found.subset_size) == (5, 30)


def test_faults_are_named():
    x = normal(5, 3)
    with pytest.raises(ValueError, match="at least 2 images in each set; the samples have 1"):
        kernel_distance(reference=x, samples=x[:1])
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match="features of the reference must be finite"):
            kernel_distance(reference=broken, samples=x)
