"""Training runs gathered into arms, which differ in more than their seeds, and arms compared with the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from eqvae.errors import UserError
from eqvae.evidence.curves import TrainingCurve, read_curve
from eqvae.evidence.intervals import (
    NUM_RESAMPLES,
    Difference,
    Draws,
    Replicate,
    common_cells,
    mean_difference,
    nested_difference,
    resample,
)
from eqvae.evidence.speed_up import SeedCurves, SpeedUp, common_levels, headline, paired_curves, speed_ups


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in their seed alone, or in that of their autoencoder too."""

    name: str

    runs: tuple[TrainingCurve, ...]
    """By autoencoder, by seed, which rise."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The generator's of each run."""
        return tuple(run.seed for run in self.runs)

    @property
    def replicates(self) -> tuple[Replicate, ...]:
        """The autoencoder's and the generator's of each run."""
        return tuple((run.autoencoder_seed, run.seed) for run in self.runs)

    @property
    def num_autoencoders(self) -> int:
        """Twins, which were fine-tuned alike with other seeds."""
        return len({run.autoencoder_seed for run in self.runs})

    @property
    def num_images(self) -> Int64[ndarray, " n"]:
        """At the validations that all seeds have: the mean curve goes no further than the seed that is behind."""
        shared = set.intersection(*(set(run.num_images.tolist()) for run in self.runs))
        return np.array(sorted(shared), dtype=np.int64)

    def by_images(self) -> SeedCurves:
        """Quality against images seen."""
        images = np.tile(self.num_images.astype(np.float64), (len(self.runs), 1))
        return SeedCurves(seeds=self._identities(), positions=images, values=self._shared("values"))

    def by_time(self) -> SeedCurves:
        """Quality against seconds of training."""
        return SeedCurves(
            seeds=self._identities(), positions=self._shared("training_sec"), values=self._shared("values")
        )

    def _identities(self) -> tuple[Any, ...]:
        """Name the runs; of one autoencoder it is not asked which seed it had."""
        return self.seeds if self.num_autoencoders == 1 else self.replicates

    def _shared(self, name: str) -> Float64[ndarray, "s n"]:
        return np.stack([getattr(run, name)[np.isin(run.num_images, self.num_images)] for run in self.runs])


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
    final: FinalDifference | None
    """None where the arms were never validated after the same number of images."""

    num_resamples: int
    """Of the seeds; 0 where they are paired, and where an arm has only one."""


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Arms and what they show."""

    measure: dict[str, Any]
    """How quality was measured, equal for all; see `TrainingCurve`."""

    arms: tuple[Arm, ...]
    """The base first."""

    comparisons: tuple[ArmComparison, ...] = ()
    """One for each arm but the base."""

    notes: tuple[str, ...] = ()
    """What these runs differ in besides, and which are unfinished."""


def read_arms(folders: Sequence[Path]) -> tuple[Arm, ...]:
    """Read runs and gather them into two arms or more."""
    known: set[Path] = set()
    for folder in folders:
        if folder.resolve() in known:
            raise UserError(f"The run '{folder}' is given twice", "Name each folder once")
        known.add(folder.resolve())
    return gather_arms([read_curve(folder) for folder in folders])


def gather_arms(curves: Sequence[TrainingCurve]) -> tuple[Arm, ...]:
    """Gather runs of one measure into two arms or more, in the order of their first runs."""
    groups: list[list[TrainingCurve]] = []
    for number, curve in enumerate(curves):
        for earlier in curves[:number]:
            _check_same_measure(earlier, curve)
        group = next((group for group in groups if _is_same_arm(group[0], curve)), None)
        if group is None:
            groups.append([curve])
        else:
            _check_same_arm(group, curve)
            group.append(curve)
    if len(groups) < 2:
        raise UserError(
            f"A comparison takes two arms or more, and the runs given make {'one' if groups else 'none'}",
            "Name runs on other latents, or of another recipe, too",
        )
    names = _names([group[0] for group in groups])
    arms = tuple(
        Arm(name=name, runs=tuple(sorted(group, key=lambda run: (run.autoencoder_seed, run.seed))))
        for name, group in zip(names, groups, strict=True)
    )
    for arm in arms:
        if not len(arm.num_images):
            raise UserError(
                f"The runs of '{arm.name}' were not measured after the same steps",
                "Give one of them, or train with the same --sample-every",
            )
    return arms


def measured_alike(first: TrainingCurve, other: TrainingCurve) -> bool:
    """Whether the values of two curves may be compared; what a run does not say is no difference."""
    return all(other.measure.get(name, value) == value for name, value in first.measure.items())


def compare_arms(arms: Sequence[Arm], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> RunComparison:
    """Compare arms with the first one; the seed draws the resamples of the arms' seeds."""
    base, *others = arms
    return RunComparison(
        measure={name: value for arm in reversed(arms) for name, value in arm.runs[0].measure.items()},
        arms=tuple(arms),
        comparisons=tuple(_compare(base, arm, seed, num_resamples) for arm in others),
        notes=tuple(_notes(arms)),
    )


def recipes_own_fields(curves: Sequence[TrainingCurve]) -> dict[str, list[Any]]:
    """Find the fields that differ because recipes do, such as published optimizer settings: names leave them out."""
    recipes = [curve.fields.get("recipe") for curve in curves]
    own = {}
    for name, values in _differing_fields(curves).items():
        of_recipe = dict(zip(recipes, values, strict=True))
        is_settled = values == [of_recipe[recipe] for recipe in recipes]
        if is_settled and name not in ("recipe", "latents_fingerprint", "decoder_fingerprint"):
            own[name] = values
    return own


def draw_seeds(base: Arm, arm: Arm, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Draws | None:
    """Resample the seeds of two arms, where they have twins their autoencoders' too; None where seeds are paired."""
    if paired_curves(base.by_images(), arm.by_images()) is not None:
        return None
    return resample(base.replicates, arm.replicates, seed=seed, num_resamples=num_resamples)


def _compare(base: Arm, arm: Arm, seed: int, num_resamples: int) -> ArmComparison:
    draws = draw_seeds(base, arm, seed=seed, num_resamples=num_resamples)
    levels = common_levels(base.by_images(), arm.by_images())
    return ArmComparison(
        base=base.name,
        arm=arm.name,
        in_images=headline(base.by_images(), arm.by_images(), draws),
        in_time=headline(base.by_time(), arm.by_time(), draws),
        levels_in_images=speed_ups(base.by_images(), arm.by_images(), levels, draws),
        levels_in_time=speed_ups(base.by_time(), arm.by_time(), levels, draws),
        final=final_difference(base, arm),
        num_resamples=len(draws.base) if draws is not None else 0,
    )


def final_difference(base: Arm, arm: Arm) -> FinalDifference | None:
    """Compare two arms after as many images as both were validated at last."""
    shared = np.intersect1d(base.num_images, arm.num_images)
    if not len(shared):
        return None
    ours, theirs = (item.by_images().values[:, item.num_images == shared[-1]][:, 0] for item in (arm, base))
    if base.num_autoencoders == arm.num_autoencoders == 1:
        found = mean_difference(theirs, ours, paired=base.seeds == arm.seeds)
    elif cells := common_cells(
        dict(zip(base.replicates, theirs.tolist(), strict=True)), dict(zip(arm.replicates, ours.tolist(), strict=True))
    ):
        found = nested_difference(cells.base, cells.arm, is_shared=cells.is_shared)
    else:
        found = mean_difference(*(_means(item, values) for item, values in ((base, theirs), (arm, ours))), paired=False)
    return FinalDifference(num_images=int(shared[-1]), **vars(found))


def _means(arm: Arm, values: Float64[ndarray, " s"]) -> Float64[ndarray, " a"]:
    """Average over the generators of each autoencoder."""
    rows: dict[tuple[int, ...], list[float]] = {}
    for (autoencoder, _), value in zip(arm.replicates, values.tolist(), strict=True):
        rows.setdefault(autoencoder, []).append(value)
    return np.array([np.mean(row) for row in rows.values()])


def _notes(arms: Sequence[Arm]) -> list[str]:
    runs = [run for arm in arms for run in arm.runs]
    found = []
    for name, values in recipes_own_fields([arm.runs[0] for arm in arms]).items():
        if None not in values:  # else a family of generators does not have it
            listed = "; ".join(f"{arm.name}: {value}" for arm, value in zip(arms, values, strict=True))
            found.append(f"The recipes also differ in {name} ({listed}).")
    for name in runs[0].pace:
        values = list(dict.fromkeys(str(run.pace[name]) for run in runs))
        if len(values) > 1:
            found.append(f"Runs differ in their {name} ({', '.join(values)}): their times say little of the latents.")
    counts = [arm.num_autoencoders for arm in arms]
    for arm in arms if max(counts) > 1 else ():
        if arm.num_autoencoders == 1 and arm.runs[0].autoencoder_recipe:
            found.append(f"{arm.name} is one fine-tuning: how far another would lie is in no interval against it.")
    unfinished = [f"'{run.folder.name}' ({run.num_images[-1]:,} images)" for run in runs if not run.is_finished]
    return found + ([f"Not finished: {', '.join(unfinished)}."] if unfinished else [])


def _names(curves: Sequence[TrainingCurve]) -> list[str]:
    """Recipe and autoencoder, and whatever else tells the arms apart."""
    silent = {"recipe", "latents_fingerprint", *recipes_own_fields(curves)}
    if len({curve.fields.get("latents_fingerprint") for curve in curves}) == len(curves):
        silent.add("decoder_fingerprint")
    more = [name for name in _differing_fields(curves) if name not in silent]
    latents = {(curve.autoencoder, curve.fields.get("latents_fingerprint")) for curve in curves}
    names = []
    for curve in curves:
        is_shared = sum(autoencoder == curve.autoencoder for autoencoder, _ in latents) > 1
        mark = f" ({str(curve.fields.get('latents_fingerprint'))[:8]})" if is_shared else ""
        differing = [(name.replace("_", " "), curve.fields.get(name)) for name in more]
        parts = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in differing]
        names.append(", ".join([f"{curve.fields.get('recipe')} on {curve.autoencoder}{mark}", *parts]))
    return names


def _differing_fields(curves: Sequence[TrainingCurve]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for curve in curves for name in curve.fields)
    found = {name: [curve.fields.get(name) for curve in curves] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _is_same_arm(first: TrainingCurve, other: TrainingCurve) -> bool:
    """Whether runs differ in seeds alone: on the same latents, or on those of a twin of their autoencoder."""
    if first.fields == other.fields:
        return True
    ours, theirs = (
        {name: None if name.endswith("_fingerprint") else value for name, value in curve.fields.items()}
        for curve in (first, other)
    )
    return bool(first.autoencoder_recipe) and first.autoencoder_recipe == other.autoencoder_recipe and ours == theirs


def _check_same_measure(first: TrainingCurve, other: TrainingCurve) -> None:
    if not measured_alike(first, other):
        name = next(name for name, value in first.measure.items() if other.measure.get(name, value) != value)
        raise UserError(
            f"'{first.folder}' and '{other.folder}' were measured differently: "
            f"{name} {first.measure[name]} and {other.measure[name]}",
            "Compare curves of one measure only",
        )


def _check_same_arm(group: Sequence[TrainingCurve], curve: TrainingCurve) -> None:
    for run in group:
        is_twin = run.fields != curve.fields
        if run.seed == curve.seed and (not is_twin or run.autoencoder_seed == curve.autoencoder_seed):
            raise UserError(
                f"'{run.folder}' and '{curve.folder}' are the same run: equal settings and seed {run.seed}",
                "Name one of them, or train with another --seed",
            )
        ours, theirs = np.array(run.latents), np.array(curve.latents)
        if (
            not is_twin
            and len(ours)
            and len(theirs)
            and not (ours.shape == theirs.shape and np.allclose(ours, theirs, 1e-2, 1e-2))
        ):
            raise UserError(
                f"'{run.folder}' and '{curve.folder}' were trained on different latents of one autoencoder",
                "Compare runs on the same cache",
            )
