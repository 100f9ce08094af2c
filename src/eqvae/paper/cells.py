"""What a reproduced table is made of: rows with expected figures, and cells that say which runs measure them here."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from eqvae.artifacts.files import read_journal
from eqvae.evidence.intervals import Difference, Replicate, common_cells, nested_difference
from eqvae.networks.features import Measure, metric_key
from eqvae.paper.arms import Arm, distance_key, evaluations
from eqvae.paper.plan import PlannedAutoencoder, PlannedRun
from eqvae.paper.setting import Family, Setting


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure, measured by one or several runs that differ in their seeds."""

    runs: tuple[PlannedRun, ...]
    """One for each seed: by autoencoder, by generator."""

    num_autoencoders: int = 1
    """Twins, each of which has as many of the runs."""

    key: str
    """Of `metrics.json`."""

    step: int | None = None
    """Read the journal's validation at this step of training instead; None: `metrics.json`."""

    def by_seed(self) -> dict[Replicate, float]:
        """Read what is there so far, by places among the autoencoders' seeds and the generators'."""
        num_seeds = len(self.runs) // self.num_autoencoders
        found = {divmod(place, num_seeds): self._read(run) for place, run in enumerate(self.runs)}
        return {
            ((autoencoder,), seed): float(value)
            for (autoencoder, seed), value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }

    def values(self) -> list[float]:
        """Read what is there so far."""
        return list(self.by_seed().values())

    def difference_from(self, base: "Cell") -> Difference | None:
        """Compare with another cell, autoencoder by autoencoder and seed by seed."""
        is_shared = self.num_autoencoders != base.num_autoencoders
        cells = common_cells(base.by_seed(), self.by_seed(), is_shared=is_shared)
        return None if cells is None else nested_difference(cells.base, cells.arm, is_shared=cells.is_shared)

    def _read(self, run: PlannedRun) -> object:
        if self.step is None:
            return run.figures().get(self.key)
        for record in read_journal(run.folder):
            if record.get("kind") == "validation" and record.get("step") == self.step:
                return record.get(self.key)
        return None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A measure: what the paper calls it, and what it is here."""

    key: str
    """In expected figures and cells."""

    paper: str
    """The paper's name; empty for what the paper has not."""

    here: str
    """The name with the features that are used: FID is Inception's alone."""

    better: Literal["lower", "higher", "neither"] = "lower"

    digits: int = 2
    """Of ours, after the decimal point."""

    paper_digits: int = 2
    """Of the paper's."""

    @property
    def arrow(self) -> str:
        """The direction of better figures."""
        return {"lower": "↓", "higher": "↑", "neither": ""}[self.better]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the paper's table, and its twin."""

    label: str
    """As the paper has it."""

    here: str = ""
    """What was run for it; empty where nothing is."""

    expected: Mapping[str, float]
    """The paper's figures by column."""

    cells: Mapping[str, Cell]
    """By column; what is missing is not measured."""

    against: str = ""
    """Label of the row that it is compared with."""

    also_against: str = ""
    """Label of a second one."""


@dataclass(frozen=True, kw_only=True)
class TableItem:
    """A table to reproduce."""

    item: str
    """`table5`."""

    title: str

    source: str
    """Where its expected figures stand."""

    scale: str

    columns: tuple[Column, ...]

    rows: tuple[Row, ...]

    notes: tuple[str, ...] = ()

    gain: tuple[str, str] | None = None
    """Labels of a row without a gain and of one that has all of it: the others' shares are told."""

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """The runs behind its cells: all rows with their first seed, then all with the second, and so on.

        Autoencoders with another seed come after all that the first ones have.
        """
        return runs_of(cell for row in self.rows for cell in row.cells.values())


def runs_of(cells: Iterable[Cell]) -> tuple[PlannedRun, ...]:
    """The runs behind some cells, those of all first autoencoders before those of their twins."""
    first, others = [], []
    for cell in cells:
        num_seeds = len(cell.runs) // cell.num_autoencoders
        first.append(cell.runs[:num_seeds])
        others.append(cell.runs[num_seeds:])
    return (*by_seed(first), *by_seed(others))


def by_seed(runs: Sequence[Sequence[PlannedRun]]) -> tuple[PlannedRun, ...]:
    """Order runs so that something of everything is there early."""
    return tuple(run for seed in zip_longest(*runs) for run in seed if run is not None)


def columns(features: str, keys: Sequence[str]) -> tuple[Column, ...]:
    """Name columns; FID, KID, precision and recall of other features than Inception's carry their name."""
    measures: tuple[Measure, ...] = ("fid", "kid", "precision", "recall")
    distance, kernel, precision, recall = (metric_key(features, measure) for measure in measures)
    # fmt: off
    known = {column.key: column for column in (
        Column(key="rfid", paper="rFID", here=f"r{distance}", digits=3),
        Column(key="gfid", paper="gFID", here=f"g{distance}", paper_digits=1),
        Column(key="gfid_fixed", paper="", here=f"g{distance}, base's factor"),
        Column(key="fid", paper="FID", here=distance),
        Column(key="fid_watch", paper="", here=f"{distance} while training, unguided"),
        Column(key="gkid", paper="", here=f"g{kernel}", digits=4),
        Column(key="kid", paper="", here=kernel, digits=4),
        Column(key="kid_watch", paper="", here=f"{kernel} while training, unguided", digits=4),
        Column(key="sfid", paper="sFID", here="sfid"),
        Column(key="inception_score", paper="IS", here="inception_score", better="higher", digits=1, paper_digits=1),
        Column(key="precision", paper="precision", here=precision, better="higher"),
        Column(key="recall", paper="recall", here=recall, better="higher"),
        Column(key="rotation", paper="R(θ) error", here="equivariance_error_rotation", digits=3),
        Column(key="scale", paper="S(s) error", here="equivariance_error_scale", digits=3),
        Column(key="dimension", paper="intrinsic dimension", here="intrinsic_dimension", digits=1, paper_digits=1),
        Column(key="spectrum", paper="", here="spectrum_excess_db"),
        Column(key="psnr", paper="PSNR, dB", here="psnr_db", better="higher"),
        Column(key="lpips", paper="LPIPS", here="lpips", digits=3, paper_digits=3),
        Column(key="ssim", paper="SSIM", here="ssim", better="higher", digits=3),
    )}
    # fmt: on
    return tuple(known[key] for key in keys)


def kept_keys(setting: Setting, keys: Sequence[str]) -> tuple[str, ...]:
    """Choose a table's columns: some scales leave the base's factor out, some have the kernel distance beside it."""
    beside = {"gfid": "gkid", "fid": "kid", "fid_watch": "kid_watch"} if setting.kernel_distances else {}
    wanted = [key for key in keys if setting.both_normalizations or key != "gfid_fixed"]
    return tuple(each for key in wanted for each in (key, beside.get(key)) if each is not None)


def evaluation_cells(setting: Setting, autoencoder: PlannedAutoencoder) -> dict[str, Cell]:
    """Say where an autoencoder's own figures are measured."""
    named = columns(
        setting.reference.features, ("rfid", "rotation", "scale", "dimension", "spectrum", "psnr", "lpips", "ssim")
    )
    return {column.key: autoencoder_cell(setting, autoencoder, column.here) for column in named}


def autoencoder_cell(setting: Setting, autoencoder: PlannedAutoencoder, key: str) -> Cell:
    """Say that the evaluations of an autoencoder and its twins measure a figure."""
    runs = evaluations(setting, autoencoder)
    return Cell(runs=runs, key=key, num_autoencoders=len(runs))


def gfid_cells(arm: Arm) -> dict[str, Cell]:
    """Say where a generator's distances are measured, for both normalizations of the latents; tokens have none."""
    cells = {"gfid": gfid_cell(arm)}
    if arm.setting.kernel_distances:
        cells["gkid"] = gfid_cell(arm, "kid")
    if arm.setting.both_normalizations and arm.family != "maskgit":
        cells["gfid_fixed"] = gfid_cell(replace(arm, is_fixed=True))
    return cells


def gfid_cell(arm: Arm, measure: Measure = "fid") -> Cell:
    """Say where a generator's distance is measured: while it trains, where the paper does not guide."""
    is_guided = arm.setting.sampling[arm.family].guidance_scale != 1.0
    return arm_cell(arm, arm.scored(guided=False) if is_guided else arm.trained, distance_key(arm.setting, measure))


def arm_cell(arm: Arm, runs: tuple[PlannedRun, ...], key: str, step: int | None = None) -> Cell:
    """Say that an arm's runs measure a figure."""
    return Cell(runs=runs, key=key, step=step, num_autoencoders=len(arm.autoencoder.all_seeds))


def score_cells(arm: Arm, *, guided: bool) -> dict[str, Cell]:
    """Say where the figures of sample sets are measured; those of Inception's logits only with Inception."""
    setting = arm.setting
    keys = ("fid", "kid", "precision", "recall", *(("sfid", "inception_score") if setting.is_fid else ()))
    named, runs = columns(setting.scoring.features, keys), arm.scored(guided=guided)
    return {column.key: arm_cell(arm, runs, column.here) for column in named}


def protocol(setting: Setting, *families: Family, with_tokens: bool = False) -> str:
    """Say how distances are measured, where families differ of each: they depend on the number of images."""
    drawn: dict[str, list[str]] = {}
    for family in families:
        drawn.setdefault(_drawn(setting, family), []).append(family)
    texts = [text if len(drawn) == 1 else f"{' and '.join(names)} {text}" for text, names in drawn.items()]
    if with_tokens:
        tokens = setting.sampling["maskgit"]
        texts[-1] += f" (on tokens all are of {tokens.num_samples} guided samples of {tokens.num_steps} steps)"
    num_images = setting.evaluation.num_images or "all"
    evaluated = f"autoencoders on {num_images} images of {setting.evaluation.image_size} px"
    return f"Distances: {'; '.join([*texts, evaluated])}."


def _drawn(setting: Setting, family: Family) -> str:
    training, sampling = setting.training[family], setting.sampling[family]
    watch = f"{training.num_watch_samples} samples of {training.watch_steps} steps{_of(training.watch_sampler)}"
    return (
        f"{watch} while training, {sampling.num_samples} of {sampling.num_steps}{_of(sampling.sampler)} in sample sets"
    )


def _of(sampler: str | None) -> str:
    return f" of {sampler}" if sampler else ""
