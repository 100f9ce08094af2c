"""The records that a comparison of training runs is made of."""

from dataclasses import dataclass
from typing import Any

from eqvae.evidence.seed_intervals import Difference
from eqvae.evidence.speed_up import SpeedUp
from eqvae.evidence.training_arms import Arm


@dataclass(frozen=True, kw_only=True)
class TimeUnit:
    """In which a comparison prints its times."""

    seconds: float
    name: str
    symbol: str


TIME_UNITS = (
    TimeUnit(seconds=3600.0, name="hours", symbol="h"),
    TimeUnit(seconds=60.0, name="minutes", symbol="min"),
    TimeUnit(seconds=1.0, name="seconds", symbol="s"),
)


@dataclass(frozen=True, kw_only=True)
class FinalDifference(Difference):
    """The arm's quality minus the base's, both after as many images."""

    num_images: int
    """The largest number after which both arms were validated."""


@dataclass(frozen=True, kw_only=True)
class ArmComparison:
    """One arm against the base."""

    base: str
    arm: str

    in_images: SpeedUp
    """At the base's last value, by images seen."""

    in_time: SpeedUp
    """The same by seconds of training."""

    levels_in_images: tuple[SpeedUp, ...]
    """At every quality level that both reach, from the worst on."""

    levels_in_time: tuple[SpeedUp, ...]
    """At the same levels."""

    final: FinalDifference | None
    """None where the arms were never validated after the same number of images."""

    num_resamples: int
    """Of the seeds; 0 where an arm has only one."""


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Arms and what they show."""

    measure: dict[str, Any]
    """How quality was measured, equal for all; see `TrainingCurve`."""

    arms: tuple[Arm, ...]
    """The base first."""

    comparisons: tuple[ArmComparison, ...]
    """One for each arm but the base."""

    notes: tuple[str, ...]
    """What a reader must know before believing the figures."""

    @property
    def label(self) -> str:
        """The distance's name: `FID`, or `FD (efficientnet-lite0)`."""
        return "FID" if self.measure["metric"] == "fid" else f"FD ({self.measure['features']})"

    @property
    def digits(self) -> int:
        """After the decimal point of a distance: features differ in scale by orders of magnitude."""
        largest = max(float(run.values.max()) for arm in self.arms for run in arm.runs)
        return next((digits for bound, digits in ((100.0, 1), (1.0, 2), (0.1, 3)) if largest >= bound), 4)

    @property
    def time_unit(self) -> TimeUnit:
        """The largest of which the longest run has at least two."""
        longest = max(float(run.training_sec[-1]) for arm in self.arms for run in arm.runs)
        return next((unit for unit in TIME_UNITS if longest >= 2 * unit.seconds), TIME_UNITS[-1])
