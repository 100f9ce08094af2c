"""Resamples of seeds, and the difference of two means, against SciPy's own tests."""

import numpy as np
import pytest
from scipy import stats

from eqvae.evidence.intervals import common_cells, mean_difference, nested_difference, percentile_interval, resample


def alone(*seeds: int):
    return [((), seed) for seed in seeds]


def test_seeds_are_drawn_apart_and_again_alike():
    first, again, other = (
        resample(alone(*range(8)), alone(*range(8)), seed=seed, num_resamples=400) for seed in (0, 0, 1)
    )
    assert first.base.shape == first.arm.shape == (400, 8)
    assert (first.base != first.arm).any()
    np.testing.assert_array_equal(first.base, again.base)
    assert (first.base != other.base).any()
    np.testing.assert_allclose(first.base.sum(axis=1), 1.0)
    np.testing.assert_allclose(first.base.mean(axis=0), 1.0 / 8.0, atol=0.03)


def test_one_seed_says_nothing_of_the_spread():
    assert resample(alone(0), alone(0)) is None
    assert resample(alone(0, 1, 2), alone(0)) is None
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


# Several autoencoders -------------------------------------------------------------------------------------------------


def replicates(num_autoencoders: int, num_seeds: int) -> list[tuple[tuple[int, ...], int]]:
    return [((autoencoder,), seed) for autoencoder in range(num_autoencoders) for seed in range(num_seeds)]


def coverage(
    spread: float, *, is_shared: bool, is_tuned: bool = False, num_autoencoders: int = 2, num_seeds: int = 3
) -> float:
    """How often the 95% interval holds a difference of 0, where autoencoders spread and the generators' seeds by 1.

    `is_tuned`: the base of `is_shared` is one fine-tuning, with a chance of its own.
    """
    random, hits, shape = np.random.default_rng(0), 0, (num_autoencoders, num_seeds)
    for _ in range(600):
        arm = random.normal(0, spread, (num_autoencoders, 1)) + random.normal(size=shape)
        base = random.normal(0, spread, (num_autoencoders, 1)) + random.normal(size=shape)
        if is_shared:
            own = random.normal(0, spread) if is_tuned else 0.0
            base = np.broadcast_to(own + random.normal(size=(1, num_seeds)), shape)
        found = nested_difference(base, arm, is_shared=is_shared).interval
        hits += found.low <= 0.0 <= found.high
    return hits / 600


@pytest.mark.parametrize("is_shared", [False, True], ids=["twins", "one base"])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_intervals_hold_the_truth_as_often_as_the_docstring_says(spread: float, is_shared: bool):
    least = 0.95 if spread == 0.0 or is_shared else 0.90
    assert least - 0.02 <= coverage(spread, is_shared=is_shared) <= 0.99


@pytest.mark.parametrize(("spread", "said"), [(1.0, 0.94), (3.0, 0.88)])
def test_one_fine_tuning_against_several_leaves_out_its_own_chance(spread: float, said: float):
    assert coverage(spread, is_shared=True, is_tuned=True) == pytest.approx(said, abs=0.025)


def test_without_looking_at_autoencoders_intervals_would_not_hold():
    """What the analysis of variance is for: six cells taken for six seeds."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(500):
        table = random.normal(0, 5, (2, 1)) + random.normal(size=(2, 3))
        found = mean_difference(np.zeros(6), table.flatten(), paired=True).interval
        hits += found.low <= 0.0 <= found.high
    assert hits / 500 < 0.7


def test_the_larger_mean_square_counts():
    base = np.zeros((2, 3))
    apart = np.array([[0.9, 1.0, 1.1], [2.9, 3.0, 3.1]])  # autoencoders differ by 2, seeds by 0.1
    found = nested_difference(base, apart)
    rows = stats.ttest_1samp([1.0, 3.0], 0.0).confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((rows.low, rows.high))
    assert (found.method, found.num_autoencoders, found.num_seeds) == ("nested t", 2, 3)
    alike = np.array([[0.9, 1.0, 1.1], [1.1, 1.0, 0.9]])  # they don't differ at all: six cells
    cells = stats.ttest_1samp(alike.flatten(), 0.0).confidence_interval(0.95)
    assert nested_difference(base, alike).interval.low == pytest.approx(cells.low)
    once = nested_difference(base[:1], apart[:1])
    assert (once.method, once.num_autoencoders) == ("paired t", 1)
    assert nested_difference(base[:, :1], apart[:, :1]).interval.low == pytest.approx(
        stats.ttest_1samp([0.9, 2.9], 0.0).confidence_interval(0.95).low
    )


def test_the_bases_own_seeds_are_common_to_all_autoencoders():
    """Two autoencoders that agree exactly tell nothing new of three runs of the base."""
    base, arm = np.array([[0.0, 1.0, 5.0]] * 2), np.full((2, 3), 4.0)
    expected = stats.ttest_1samp([4.0, 3.0, -1.0], 0.0).confidence_interval(0.95)
    found = nested_difference(base, arm, is_shared=True).interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert nested_difference(base[:, :1], arm[:, :1], is_shared=True).interval is None


def test_cells_are_paired_by_both_seeds():
    arm = {key: float(place) for place, key in enumerate(replicates(2, 3))}
    cells = common_cells(arm, {key: value + 1.0 for key, value in arm.items()})
    np.testing.assert_array_equal(cells.arm - cells.base, np.ones((2, 3)))
    assert not cells.is_shared
    base = {((), seed): 10.0 * seed for seed in range(3)}
    shared = common_cells(base, arm)
    np.testing.assert_array_equal(shared.base, [[0.0, 10.0, 20.0]] * 2)
    assert shared.is_shared
    half = {key: value for key, value in arm.items() if key != ((1,), 2)}
    assert common_cells(base, half).arm.shape == (2, 2)  # the largest complete table
    few = {key: value for key, value in arm.items() if key[0] == (0,) or key[1] == 0}
    assert common_cells(base, few).arm.shape == (1, 3)
    assert common_cells({((), 7): 1.0}, arm) is None


def test_autoencoders_are_drawn_and_seeds_of_each():
    apart = resample(replicates(2, 2), replicates(3, 3), num_resamples=300)
    assert (apart.base.shape, apart.arm.shape) == ((300, 4), (300, 9))
    np.testing.assert_allclose(apart.arm.sum(axis=1), 1.0)
    np.testing.assert_allclose(apart.arm.mean(axis=0), 1 / 9, atol=0.03)
    ragged = resample(replicates(1, 2), [((0,), 0), ((0,), 1), ((1,), 0)], num_resamples=300)
    np.testing.assert_allclose(ragged.arm.mean(axis=0), [1 / 4, 1 / 4, 1 / 2], atol=0.08)
    assert resample([((), 0)], replicates(2, 3)) is None
