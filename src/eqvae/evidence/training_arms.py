"""Training runs gathered into arms: an arm is a set of runs that differ in their seed alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from eqvae.errors import UserError
from eqvae.evidence.speed_up import SeedCurves
from eqvae.report.training_curves import TrainingCurve, read_curve


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str

    runs: tuple[TrainingCurve, ...]
    """By seed, which rises."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """One for each run."""
        return tuple(run.seed for run in self.runs)

    @property
    def num_images(self) -> Int64[ndarray, " n"]:
        """At the validations that all seeds have: the mean curve goes no further than the seed that is behind."""
        shared = set.intersection(*(set(run.num_images.tolist()) for run in self.runs))
        return np.array(sorted(shared), dtype=np.int64)

    def by_images(self) -> SeedCurves:
        """Quality against images seen."""
        images = self.num_images.astype(np.float64)
        return SeedCurves(
            seeds=self.seeds, positions=np.tile(images, (len(self.runs), 1)), values=self._shared("values")
        )

    def by_time(self) -> SeedCurves:
        """Quality against seconds of training."""
        return SeedCurves(seeds=self.seeds, positions=self._shared("training_sec"), values=self._shared("values"))

    def _shared(self, name: str) -> Float64[ndarray, "s n"]:
        return np.stack([getattr(run, name)[np.isin(run.num_images, self.num_images)] for run in self.runs])


def read_arms(folders: Sequence[Path]) -> tuple[Arm, ...]:
    """Read runs and gather them into arms."""
    known: set[Path] = set()
    for folder in folders:
        if folder.resolve() in known:
            raise UserError(f"The run '{folder}' is given twice", "Name each folder once")
        known.add(folder.resolve())
    curves = [read_curve(folder) for folder in folders]
    for curve in curves[1:]:
        _check_same_measure(curves[0], curve)
    groups: list[list[TrainingCurve]] = []
    for curve in curves:
        for group in groups:
            if group[0].fields == curve.fields:
                _check_same_arm(group, curve)
                group.append(curve)
                break
        else:
            groups.append([curve])
    if len(groups) < 2:
        raise UserError(
            f"A comparison takes two arms or more, and the runs given make {'one' if groups else 'none'}",
            "Name runs on other latents, or of another recipe, too",
        )
    arms = tuple(
        Arm(name=name, runs=tuple(sorted(group, key=lambda run: run.seed)))
        for name, group in zip(_names([group[0] for group in groups]), groups, strict=True)
    )
    for arm in arms:
        if not len(arm.num_images):
            raise UserError(
                f"The runs of '{arm.name}' were not measured after the same steps",
                "Give one of them, or train with the same --sample-every",
            )
    return arms


def differing_fields(curves: Sequence[TrainingCurve]) -> dict[str, list[Any]]:
    """Find the fields in which arms differ."""
    names = dict.fromkeys(name for curve in curves for name in curve.fields)
    found = {name: [curve.fields.get(name) for curve in curves] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def recipes_own_fields(curves: Sequence[TrainingCurve]) -> dict[str, list[Any]]:
    """Find the fields that differ because recipes do, such as published optimizer settings: names leave them out."""
    own = {}
    for name, values in differing_fields(curves).items():
        of_recipe: dict[Any, Any] = {}
        for curve, value in zip(curves, values, strict=True):
            of_recipe.setdefault(curve.fields.get("recipe"), value)
        if name != "recipe" and all(
            of_recipe[curve.fields.get("recipe")] == curve.fields.get(name) for curve in curves
        ):
            own[name] = values
    return {name: values for name, values in own.items() if name != "latents_fingerprint"}


def _names(curves: Sequence[TrainingCurve]) -> list[str]:
    """Recipe and autoencoder, and whatever else tells the arms apart."""
    differing, own = differing_fields(curves), recipes_own_fields(curves)
    more = [name for name in differing if name not in ("recipe", "latents_fingerprint", *own)]
    fingerprints: dict[str, set[Any]] = {}
    for curve in curves:
        fingerprints.setdefault(curve.autoencoder, set()).add(curve.fields.get("latents_fingerprint"))
    names = []
    for curve in curves:
        is_shared = len(fingerprints[curve.autoencoder]) > 1
        mark = f" ({str(curve.fields.get('latents_fingerprint'))[:8]})" if is_shared else ""
        parts = [f"{curve.fields.get('recipe')} on {curve.autoencoder}{mark}"]
        parts += [f"{name.replace('_', ' ')} {_show(curve.fields.get(name))}" for name in more]
        names.append(", ".join(parts))
    return names


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_same_measure(first: TrainingCurve, other: TrainingCurve) -> None:
    for name, value in first.measure.items():
        if other.measure.get(name, value) != value:
            raise UserError(
                f"'{first.folder}' and '{other.folder}' were measured differently: "
                f"{name} {value} and {other.measure[name]}",
                "Compare curves of one measure only",
            )


def _check_same_arm(group: Sequence[TrainingCurve], curve: TrainingCurve) -> None:
    for run in group:
        if run.seed == curve.seed:
            raise UserError(
                f"'{run.folder}' and '{curve.folder}' are the same run: equal settings and seed {run.seed}",
                "Name one of them, or train with another --seed",
            )
        ours, theirs = np.array(run.latents), np.array(curve.latents)
        if len(ours) and len(theirs) and not (ours.shape == theirs.shape and np.allclose(ours, theirs, 1e-2, 1e-2)):
            raise UserError(
                f"'{run.folder}' and '{curve.folder}' were trained on different latents of one autoencoder",
                "Compare runs on the same cache",
            )
