"""Resamples of seeds, and the difference of two means, against SciPy's own tests."""

import numpy as np
import pytest
from scipy import stats

from eqvae.evidence.intervals import mean_difference, percentile_interval, resample


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_few_paired_seeds_are_drawn_in_every_way(num_seeds: int):
    draws = resample(range(num_seeds), range(num_seeds))
    assert draws.base is draws.arm
    assert draws.base.shape == (num_seeds**num_seeds, num_seeds)
    np.testing.assert_allclose(draws.base.sum(axis=1), 1.0)
    np.testing.assert_allclose(draws.base.mean(axis=0), 1.0 / num_seeds)
    assert (draws.base == 1.0).any(axis=1).sum() == num_seeds


def test_unpaired_seeds_are_drawn_apart():
    draws = resample((0, 1, 2), (0, 1))
    assert (draws.base.shape, draws.arm.shape) == ((108, 3), (108, 2))
    assert len({(*ours, *theirs) for ours, theirs in zip(draws.base, draws.arm, strict=True)}) == 10 * 3
    many = resample(range(9), range(20, 29), num_resamples=500)
    assert many.base.shape == many.arm.shape == (500, 9)
    assert (many.base != many.arm).any()


def test_many_paired_seeds_are_drawn_together_and_again_alike():
    first, again, other = (resample(range(8), range(8), seed=seed, num_resamples=400) for seed in (0, 0, 1))
    assert first.base.shape == (400, 8)
    np.testing.assert_array_equal(first.base, first.arm)
    np.testing.assert_array_equal(first.base, again.base)
    assert (first.base != other.base).any()
    np.testing.assert_allclose(first.base.mean(axis=0), 1.0 / 8.0, atol=0.03)


def test_one_seed_says_nothing_of_the_spread():
    assert resample((0,), (0,)) is None
    assert resample((0, 1, 2), (0,)) is None
    found = mean_difference(np.array([3.0]), np.array([1.0, 2.0]), paired=False)
    assert (found.difference, found.interval, found.method, found.shown) == (-1.5, None, None, False)


@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("shift", [0.1, -6.0])
def test_the_difference_is_scipys(is_paired: bool, shift: float):
    random = np.random.default_rng(0)
    base = random.normal(40, 2, 4)
    arm = base + shift + random.normal(0, 1, 4) if is_paired else random.normal(40 + shift, 1, 6)
    test = stats.ttest_rel(arm, base) if is_paired else stats.ttest_ind(arm, base, equal_var=False)
    expected = test.confidence_interval(0.95)
    found = mean_difference(base, arm, paired=is_paired)
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.shown == (test.pvalue < 0.05) == (shift < -1)
    assert found.method == ("paired t" if is_paired else "Welch's t")
    assert found.num_seeds == 4


@pytest.mark.parametrize("is_paired", [True, False])
def test_seeds_without_spread(is_paired: bool):
    found = mean_difference(np.array([2.0, 2.0]), np.array([1.0, 1.0]), paired=is_paired)
    assert (found.interval.low, found.interval.high, found.shown) == (-1.0, -1.0, True)
    assert not mean_difference(np.array([2.0, 2.0]), np.array([2.0, 2.0]), paired=is_paired).shown


def test_percentiles_of_bounds_are_open_where_the_bounds_are():
    values = np.arange(1.0, 101.0)
    known = percentile_interval(values, values, 0.9)
    assert (known.low, known.high) == (5.0, 96.0)
    low, high = values.copy(), values.copy()
    low[-20:], high[-20:] = 0.0, np.inf
    opened = percentile_interval(low, high, 0.9)
    assert (opened.low, opened.high) == (None, None)
    whole = percentile_interval(values, values, 1.0)
    assert (whole.low, whole.high) == (1.0, 100.0)
