"""Time-to-quality speed-ups of curves whose ratio is known."""

import numpy as np
import pytest
from scipy import stats

from eqvae.evidence.intervals import resample
from eqvae.evidence.speed_up import MeanCurves, SeedCurves, common_levels, headline, paired_curves, reach, speed_ups

GRID = 1e4 * np.array([1.0, 1.5, 2.2, 3.0, 4.5, 7.0, 10.0])


def power_law(n: np.ndarray) -> np.ndarray:
    return 30.0 + 100.0 * (n / 1e4) ** -0.7


def curve(positions, values, seeds: tuple[int, ...] = (0,)) -> SeedCurves:
    rows = (len(seeds), len(positions))
    return SeedCurves(
        seeds=seeds,
        positions=np.broadcast_to(np.asarray(positions, dtype=np.float64), rows).copy(),
        values=np.broadcast_to(np.asarray(values, dtype=np.float64), rows).copy(),
    )


def first_reached(positions, values, *levels: float):
    curves = curve(positions, values).mean()
    return reach(curves, np.array([levels], dtype=np.float64))


# The ratio -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.4, 1.0, 1.7, 7.0])
def test_the_ratio_is_exact_where_both_are_validated_at_the_same_qualities(ratio: float):
    base, arm = curve(GRID, power_law(GRID)), curve(GRID / ratio, power_law(GRID))
    found = speed_ups(base, arm, common_levels(base, arm), None)
    assert len(found) == 20
    assert [item.ratio for item in found] == pytest.approx([ratio] * 20, rel=1e-9)
    assert {item.bound for item in found} == {"exact"}
    last = headline(base, arm, None)
    assert (last.level, last.base_at) == (power_law(GRID)[-1], GRID[-1])
    assert last.ratio == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.6, 1.4, 2.4])
def test_elsewhere_the_ratio_is_as_good_as_the_interpolation(ratio: float):
    errors = []
    for num in (8, 64):
        positions = np.geomspace(1e4, 1e5, num)
        base, arm = curve(positions, power_law(positions)), curve(positions, power_law(ratio * positions))
        found = speed_ups(base, arm, common_levels(base, arm), None)
        exact = [item.ratio for item in found if item.bound == "exact"]
        assert len(exact) >= 5
        errors.append(max(abs(value / ratio - 1.0) for value in exact))
    assert errors[0] < 0.03
    assert errors[1] < max(errors[0] / 10, 1e-4)  # falls with the square of the distance


def test_the_logarithm_is_why_the_ratio_is_exact():
    """Interpolated in images, not in their logarithm, the crossing would lie elsewhere."""
    assert first_reached([1, 4], [2.0, 1.0], 1.5).at.item() == pytest.approx(2.0)


def test_wall_time_of_an_arm_whose_steps_take_twice_as_long():
    values = power_law(GRID)
    base_sec, arm_sec = 0.01 * GRID, 0.02 * GRID / 3.0  # three times fewer images, twice the time for each
    found = headline(curve(base_sec, values), curve(arm_sec, values), None)
    assert found.ratio == pytest.approx(1.5, rel=1e-9)
    assert (found.base_at, found.arm_at) == pytest.approx((1000.0, 2000.0 / 3.0))


def test_times_of_seeds_are_averaged():
    seeds = (0, 1)
    base = SeedCurves(seeds=seeds, positions=np.array([[1.0, 2.0], [3.0, 6.0]]), values=np.array([[2.0, 1.0]] * 2))
    assert headline(base, base, None).base_at == pytest.approx(4.0)


# Where a level is reached ---------------------------------------------------------------------------------------------


def test_bumps_neither_take_a_level_back_nor_reach_it_twice():
    found = first_reached([1, 2, 4, 8], [10.0, 6.0, 8.0, 4.0], 10.0, 7.0, 6.0, 5.0, 4.0)
    assert found.at[0] == pytest.approx([1.0, 2.0**0.75, 2.0, 4.0 * 2.0**0.5, 8.0])
    assert not found.never.any()
    assert not found.before_first.any()


def test_better_qualities_are_never_reached_earlier():
    random = np.random.default_rng(0)
    values = np.sort(random.random(30))[::-1] + 0.2 * random.random(30)
    levels = np.linspace(values[0], values.min(), 200)
    found = first_reached(np.arange(1, 31), values, *levels)
    assert (np.diff(found.at[0]) >= 0).all()
    assert not found.never.any()


def test_crossings_are_those_of_linear_interpolation():
    """On falling curves NumPy's interpolation of log N over -q says the same."""
    random = np.random.default_rng(1)
    values = -np.sort(-random.random((6, 12)), axis=1)
    positions = np.cumsum(random.random((6, 12)) + 0.1, axis=1)
    levels = np.linspace(values[:, :1], values[:, -1:], 9, axis=1)[..., 0]
    found = reach(MeanCurves(positions=positions, values=values), levels)
    expected = [
        np.exp(np.interp(-level, -value, np.log(position)))
        for level, value, position in zip(levels, values, positions, strict=True)
    ]
    np.testing.assert_allclose(found.at, np.stack(expected), rtol=1e-9)


def test_a_single_validation():
    once = curve([5.0], [2.0])
    found = headline(curve([10.0, 20.0], [3.0, 2.0]), once, None)
    assert (found.ratio, found.bound) == (4.0, "exact")
    assert headline(once, curve([1.0], [3.0]), None).bound == "at_most"
    assert len(common_levels(once, once)) == 1


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_an_arm_that_never_gets_there():
    found = headline(curve([10, 20], [5.0, 4.0]), curve([10, 50], [6.0, 4.5]), None)
    assert (found.bound, found.arm_reaches, found.ratio) == ("at_most", "never", pytest.approx(20 / 50))
    assert found.arm_at == 50.0


def test_an_arm_that_is_better_from_the_start():
    found = headline(curve([10, 20], [5.0, 4.0]), curve([5, 50], [3.0, 2.0]), None)
    assert (found.bound, found.arm_reaches, found.ratio) == ("at_least", "before_first", pytest.approx(4.0))


def test_a_level_at_the_very_first_validation_is_no_bound():
    found = headline(curve([10, 20], [5.0, 4.0]), curve([5, 50], [4.0, 2.0]), None)
    assert (found.bound, found.ratio) == ("exact", pytest.approx(4.0))


def test_bounds_on_the_bases_side():
    base, arm = curve([10, 20], [5.0, 4.0]), curve([10, 30], [8.0, 3.0])
    early, late = speed_ups(base, arm, np.array([6.0, 3.5]), None)
    assert (early.base_reaches, early.bound) == ("before_first", "at_most")
    assert (late.base_reaches, late.bound) == ("never", "at_least")
    assert late.ratio == pytest.approx(20 / late.arm_at)


def test_nothing_is_known_where_both_were_there_before_the_first_validation():
    both = curve([10, 20], [5.0, 4.0])
    assert [item.bound for item in speed_ups(both, both, np.array([6.0, 3.0]), None)] == ["unknown", "unknown"]


def test_levels_run_from_the_worse_start_to_what_both_reach():
    levels = common_levels(curve([1, 2, 3], [9.0, 5.0, 6.0]), curve([1, 2], [7.0, 3.0]), num_levels=5)
    np.testing.assert_allclose(levels, [9.0, 8.0, 7.0, 6.0, 5.0])


# Seeds ----------------------------------------------------------------------------------------------------------------


def noisy(random: np.random.Generator, seeds: tuple[int, ...], ratio: float) -> SeedCurves:
    """Runs that differ as a whole and at each validation; these lie so near that interpolation does not matter."""
    positions = np.geomspace(1e4, 1e5, 14)
    values = power_law(ratio * positions) + random.normal(0, 0.7, (len(seeds), 1))
    return curve(positions, values + random.normal(0, 0.7, (len(seeds), len(positions))), seeds)


@pytest.mark.parametrize(("is_paired", "num_seeds"), [(True, 3), (True, 16), (False, 16)])
def test_intervals_cover_the_true_ratio_at_about_their_nominal_rate(is_paired: bool, num_seeds: int):
    random, ratio = np.random.default_rng(3), 1.6
    seeds = tuple(range(num_seeds))
    others = seeds if is_paired else tuple(range(num_seeds, 2 * num_seeds))
    num_covered = 0
    for repetition in range(200):
        base, arm = noisy(random, seeds, 1.0), noisy(random, others, ratio)
        pairs = [[((), seed) for seed in each] for each in (seeds, others)]
        draws = None if is_paired else resample(*pairs, seed=repetition, num_resamples=200)
        interval = headline(base, arm, draws).interval
        num_covered += (interval.low or 0.0) <= ratio <= (interval.high or np.inf)
    assert 0.85 <= num_covered / 200 <= 0.995


def twins(random: np.random.Generator, ratio: float, *, spread: float) -> SeedCurves:
    """Two autoencoders of one recipe, three generators on each: both move the curve along the images."""
    positions = np.geomspace(1e4, 1e5, 8)
    faster = np.exp(random.normal(0, spread, (2, 1)) + random.normal(0, 0.05, (2, 3))).reshape(-1, 1)
    seeds = tuple(((autoencoder,), seed) for autoencoder in range(2) for seed in range(3))
    return SeedCurves(
        seeds=seeds, positions=np.tile(positions, (6, 1)), values=power_law(ratio * faster * positions)
    )  # fmt: skip


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.1])
def test_intervals_account_for_the_autoencoders_too(spread: float):
    random, ratio = np.random.default_rng(5), 1.6
    intervals = [
        headline(twins(random, 1.0, spread=spread), twins(random, ratio, spread=spread), None).interval
        for _ in range(200)
    ]
    assert 0.87 <= np.mean([(each.low or 0.0) <= ratio <= (each.high or np.inf) for each in intervals]) <= 0.995


def test_paired_seeds_say_how_sure_their_mean_is():
    base = SeedCurves(seeds=(0, 1), positions=np.array([[1.0, 8.0]] * 2), values=np.array([[2.0, 1.0], [3.0, 2.0]]))
    arm = SeedCurves(seeds=(0, 1), positions=np.array([[1.0, 4.0]] * 2), values=np.array([[2.0, 1.0], [3.0, 1.0]]))
    found = headline(base, arm, None)
    assert found.seed_range.low == pytest.approx(2.0)  # 8 / 4
    assert found.seed_range.high == pytest.approx(4.0)  # 8 / 4 ** 0.5
    spread = stats.ttest_1samp(np.log([2.0, 4.0]), 0.0).confidence_interval(0.95)
    factor = np.exp((spread.high - spread.low) / 2)
    assert (found.interval.low, found.interval.high) == pytest.approx((found.ratio / factor, found.ratio * factor))


def test_a_base_with_one_autoencoder_is_paired_with_all():
    positions, seeds = np.array([[1.0, 8.0]] * 4), tuple(((place,), seed) for place in range(2) for seed in range(2))
    base = SeedCurves(seeds=(0, 1), positions=positions[:2], values=np.array([[2.0, 1.0], [3.0, 2.0]]))
    values = np.array([[2.0, 0.5], [3.0, 1.0], [2.0, 0.6], [3.0, 1.2]])
    cells = paired_curves(base, SeedCurves(seeds=seeds, positions=positions, values=values))
    assert cells.is_shared
    np.testing.assert_array_equal(cells.base, [[0, 1], [0, 1]])
    np.testing.assert_array_equal(cells.arm, [[0, 1], [2, 3]])


def test_other_seeds_have_no_range():
    values = power_law(GRID)
    assert headline(curve(GRID, values, (0, 1)), curve(GRID, values, (0, 2)), None).seed_range is None
    assert headline(curve(GRID, values), curve(GRID, values), None).seed_range is None


def test_an_interval_is_open_where_some_seeds_know_a_bound_only():
    seeds = (0, 1, 2)
    base = curve([10, 20], [5.0, 4.0], seeds)
    values = np.array([[6.0, 3.0], [6.0, 3.0], [1.0, 1.0]])
    arm = SeedCurves(seeds=seeds, positions=base.positions, values=values)
    found = headline(base, arm, None)
    assert found.bound == "exact"
    assert found.interval.high is None
    assert found.interval.low is not None
    values = np.array([[6.0, 3.0], [6.0, 3.0], [7.0, 6.0]])
    late = headline(base, SeedCurves(seeds=seeds, positions=base.positions, values=values), None)
    assert late.bound == "exact"
    assert (late.interval.low, late.seed_range.low) == (None, None)
    assert late.interval.high is not None


def test_a_bound_does_not_make_the_closed_side_surer():
    """Two seeds at 1.18 and 1.21, a third that is known to be 1.15 or more, and mean curves that say 1.23."""
    positions = np.array([[1.0, 2.0, 4.0]] * 3)
    base = SeedCurves(seeds=(0, 1, 2), positions=positions, values=np.array([[9.0, 6.0, 4.0]] * 3))
    values = np.array([[9.0, 5.5, 3.0], [9.0, 5.6, 3.2], [3.9, 3.0, 2.0]])
    found = headline(base, SeedCurves(seeds=(0, 1, 2), positions=positions, values=values), None)
    assert found.interval.high is None
    assert found.interval.low < found.seed_range.low
