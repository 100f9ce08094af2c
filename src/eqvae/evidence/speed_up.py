"""How many times as fast one learning curve reaches a quality as another. Mathematics only, no files.

A curve is a list of validations: positions (images seen, or seconds), all positive and rising, and values (a Frechet
distance), of which lower ones are better. For a quality level q, N(q) is the position at which a curve first reaches q:

    speed-up(q) = N_base(q) / N_arm(q)

Between two validations N(q) is interpolated on the running minimum of the curve, linearly in the logarithm of the
position.

- The running minimum, since a level once reached stays reached: a bump, as measures on finite numbers of samples have
  them, then neither takes a level back nor makes it be reached twice, and N falls as q rises. It picks lucky
  validations, in all arms alike.
- The logarithm, since learning curves are nearly power laws, which bend much less in log N than in N; and since then a
  curve that is another one r times as fast, q(r n), is a shifted copy, for which the ratio comes out as r exactly
  wherever both were validated at the same qualities.

Power laws still lie a little below their chords, so that an arm reaches the base's last value a little late, and the
ratio errs to the safe side: by 1% where validations lie a factor of 1.5 apart.

Outside its validations a curve says only that N lies before the first or after the last one, and the ratio is a bound.

Seeds that both arms have are paired: the logarithms of their own speed-ups spread about that of the mean curves, and
Student's t, or with several autoencoders the nested analysis of variance of `intervals`, gives the interval.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from eqvae.evidence.intervals import (
    CONFIDENCE,
    Cells,
    Draws,
    Interval,
    Replicate,
    common_cells,
    nested_difference,
    percentile_interval,
)

NUM_LEVELS = 20

Bound = Literal["exact", "at_least", "at_most", "unknown"]
"""How the true ratio lies to the one that is given; `unknown`: nothing is known of it."""

Where = Literal["between", "before_first", "never"]
"""Whether a level is reached between two validations (or at one), before the first, or not up to the last."""


@dataclass(frozen=True, kw_only=True)
class MeanCurves:
    """Mean curves of one arm, one for each resample of its seeds."""

    positions: Float64[ndarray, "b n"]
    values: Float64[ndarray, "b n"]


@dataclass(frozen=True, kw_only=True)
class SeedCurves:
    """The curves of one arm's seeds, validated after the same numbers of steps."""

    seeds: tuple[Any, ...]
    """Rising: the generator's, where there are several autoencoders after the autoencoder's."""

    positions: Float64[ndarray, "s n"]
    """Images seen or seconds; positive, rising in each row."""

    values: Float64[ndarray, "s n"]
    """Lower is better."""

    def mean(self, weights: Float64[ndarray, "b s"] | None = None) -> MeanCurves:
        """Average over seeds, validation by validation."""
        if weights is None:
            weights = np.full((1, len(self.seeds)), 1.0 / len(self.seeds))
        return MeanCurves(positions=weights @ self.positions, values=weights @ self.values)


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """Where curves first reach levels."""

    at: Float64[ndarray, "b l"]
    """Position; that of the first or last validation where the level is reached outside them."""

    before_first: Bool[ndarray, "b l"]
    never: Bool[ndarray, "b l"]

    def where(self, level: int) -> Where:
        """Name how the first curve reaches a level."""
        if self.never[0, level]:
            return "never"
        return "before_first" if self.before_first[0, level] else "between"


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Speed-ups, and within which bounds the validations keep them."""

    levels: Float64[ndarray, "b l"]
    base: Crossings
    arm: Crossings

    @property
    def value(self) -> Float64[ndarray, "b l"]:
        """N_base(q) / N_arm(q), as far as the validations go."""
        return self.base.at / self.arm.at

    @property
    def low(self) -> Float64[ndarray, "b l"]:
        """`value`, or 0 where the arm has not reached the level, or the base had it before its first validation."""
        return np.where(self.arm.never | self.base.before_first, 0.0, self.value)

    @property
    def high(self) -> Float64[ndarray, "b l"]:
        """`value`, or infinity where the base has not reached it, or the arm had it before its first validation."""
        return np.where(self.base.never | self.arm.before_first, np.inf, self.value)

    def bound(self, level: int) -> Bound:
        """Say how the first curves' true ratio lies to `value`."""
        is_above, is_below = np.isinf(self.high[0, level]), self.low[0, level] == 0.0
        if is_above and is_below:
            return "unknown"
        return "at_least" if is_above else "at_most" if is_below else "exact"

    def interval(self, level: int, confidence: float) -> Interval:
        """Sum up all curves' ratios at one level."""
        return percentile_interval(self.low[:, level], self.high[:, level], confidence)


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """The speed-up at one quality level."""

    level: float
    base_at: float
    arm_at: float
    """Positions at which the level is reached, or the first or last one; see `base_reaches`, `arm_reaches`."""

    base_reaches: Where
    arm_reaches: Where
    ratio: float
    bound: Bound

    interval: Interval | None
    """95%, of paired seeds by Student's t, of others by bootstrap; None where an arm has only one."""

    seed_range: Interval | None
    """Smallest and largest ratio of single seeds; None unless all of them are paired, and are two or more."""


def reach(curves: MeanCurves, levels: Float64[ndarray, "b l"]) -> Crossings:
    """Find where curves first reach levels; see the module's docstring for how and why."""
    lowest = np.minimum.accumulate(curves.values, axis=1)
    reached = np.stack([(lowest > level[:, None]).sum(axis=1) for level in levels.T], axis=1)  # index of a validation
    never = reached == lowest.shape[1]
    right = np.minimum(reached, lowest.shape[1] - 1)
    left = np.maximum(right - 1, 0)
    above, below = np.take_along_axis(lowest, left, axis=1), np.take_along_axis(lowest, right, axis=1)
    share = np.divide(above - levels, above - below, out=np.ones_like(levels), where=(reached > 0) & ~never)
    start, end = np.take_along_axis(curves.positions, left, 1), np.take_along_axis(curves.positions, right, 1)
    return Crossings(
        at=np.where(share == 1.0, end, start * (end / start) ** share),
        before_first=(reached == 0) & (lowest[:, :1] < levels),
        never=never,
    )


def common_levels(base: SeedCurves, arm: SeedCurves, num_levels: int = NUM_LEVELS) -> Float64[ndarray, " l"]:
    """Choose quality levels that both mean curves reach."""
    first, best = zip(
        *((curve[0], curve.min()) for curve in (base.mean().values[0], arm.mean().values[0])), strict=True
    )
    return np.unique(np.linspace(max(first), max(best), num_levels))[::-1].copy()


def speed_ups(
    base: SeedCurves, arm: SeedCurves, levels: Float64[ndarray, " l"], draws: Draws | None
) -> tuple[SpeedUp, ...]:
    """Compare two arms at fixed quality levels."""
    return _speed_ups(base, arm, draws, lambda curves: np.broadcast_to(levels, (len(curves.values), len(levels))))


def headline(base: SeedCurves, arm: SeedCurves, draws: Draws | None) -> SpeedUp:
    """Compare two arms at the quality that the base ends with.

    Each resample of the seeds has its own such quality. A fixed one would lie beyond the base's end in half of them.
    """
    (found,) = _speed_ups(base, arm, draws, lambda curves: curves.values[:, -1:])
    return found


def paired_curves(base: SeedCurves, arm: SeedCurves) -> Cells | None:
    """Which curves of both arms share their seeds, by their places; None where some have no counterpart."""
    places = [{_replicate(seed): float(place) for place, seed in enumerate(each.seeds)} for each in (base, arm)]
    cells = common_cells(*places)
    return None if cells is None or cells.arm.size < max(len(base.seeds), len(arm.seeds)) else cells


def _replicate(seed: Any) -> Replicate:
    return seed if isinstance(seed, tuple) else ((), seed)


def _speed_ups(
    base: SeedCurves, arm: SeedCurves, draws: Draws | None, levels_of: Callable[[MeanCurves], ndarray]
) -> tuple[SpeedUp, ...]:
    """`levels_of` is given the base's mean curves."""

    def compare(base_curves: MeanCurves, arm_curves: MeanCurves) -> Ratios:
        levels = levels_of(base_curves)
        return Ratios(levels=levels, base=reach(base_curves, levels), arm=reach(arm_curves, levels))

    ratios = compare(base.mean(), arm.mean())
    resampled = compare(base.mean(draws.base), arm.mean(draws.arm)) if draws is not None else None
    pairs, single = paired_curves(base, arm), None
    if pairs is not None and pairs.arm.size > 1:
        single = compare(*(each.mean(np.eye(len(each.seeds))[rows.astype(int).ravel()])
                           for each, rows in ((base, pairs.base), (arm, pairs.arm))))  # fmt: skip

    def interval(index: int) -> Interval | None:
        if single is not None and pairs is not None:
            return _interval_of_pairs(ratios, single, pairs, index)
        return resampled.interval(index, CONFIDENCE) if resampled is not None else None

    return tuple(
        SpeedUp(
            level=float(level),
            base_at=float(ratios.base.at[0, index]),
            arm_at=float(ratios.arm.at[0, index]),
            base_reaches=ratios.base.where(index),
            arm_reaches=ratios.arm.where(index),
            ratio=float(ratios.value[0, index]),
            bound=ratios.bound(index),
            interval=interval(index),
            seed_range=single.interval(index, 1.0) if single is not None else None,
        )
        for index, level in enumerate(ratios.levels[0])
    )


def _interval_of_pairs(ratios: Ratios, single: Ratios, pairs: Cells, level: int) -> Interval | None:
    """Take the spread of paired seeds' logarithms; open where a seed knows a bound only, and no 95% on its other side.

    Such a seed's logarithm spreads too little, so that the wider one of the two centres counts.
    """
    logarithms = np.log(single.value[:, level]).reshape(pairs.arm.shape)
    spread = nested_difference(np.zeros_like(logarithms), logarithms, is_shared=pairs.is_shared).interval
    if spread is None or spread.low is None or spread.high is None:
        return None
    factor, centres = float(np.exp((spread.high - spread.low) / 2.0)), [float(ratios.value[0, level])]
    is_open = any((each.low[:, level] == 0.0).any() for each in (ratios, single))
    is_endless = any(np.isinf(each.high[:, level]).any() for each in (ratios, single))
    if is_open or is_endless:
        centres.append(float(np.exp(logarithms.mean())))
    return Interval(low=None if is_open else min(centres) / factor, high=None if is_endless else max(centres) * factor)
