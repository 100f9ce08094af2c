"""What a reproduced table is: rows with expected figures, and cells that say which runs measure them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np

from eqvae.artifacts import read_journal
from eqvae.evidence.intervals import Difference, mean_difference
from eqvae.networks.features import INCEPTION, metric_key
from eqvae.paper.planned import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure, measured by one or several runs that differ in their seed."""

    runs: tuple[PlannedRun, ...]
    """One for each seed."""

    key: str
    """Of `metrics.json`."""

    step: int | None = None
    """Read the journal's validation at this step of training instead; None: `metrics.json`."""

    def by_seed(self) -> dict[int, float]:
        """Read what is there so far."""
        found = {place: _read(run, self.key, self.step) for place, run in enumerate(self.runs)}
        return {
            place: float(value)
            for place, value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }

    def difference_from(self, base: "Cell") -> Difference | None:
        """Compare with another cell, seed by seed."""
        ours, theirs = self.by_seed(), base.by_seed()
        common = [place for place in ours if place in theirs]
        if not common:
            return None
        ours_common, theirs_common = (np.array([values[place] for place in common]) for values in (ours, theirs))
        return mean_difference(theirs_common, ours_common, paired=True)

    def values(self) -> list[float]:
        """Read what is there so far: the figures of `by_seed`."""
        return list(self.by_seed().values())


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


@dataclass(frozen=True, kw_only=True)
class Table:
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

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """The runs behind its cells: all rows with their first seed, then all with the second, and so on."""
        cells = [cell.runs for row in self.rows for cell in row.cells.values()]
        return by_seed(cells)


def by_seed(runs: Sequence[Sequence[PlannedRun]]) -> tuple[PlannedRun, ...]:
    """Order runs so that something of everything is there early."""
    return tuple(run for seed in zip_longest(*runs) for run in seed if run is not None)


def columns(features: str, keys: Sequence[str]) -> tuple[Column, ...]:
    """Name columns."""
    distance = metric_key(features)
    is_inception = features == INCEPTION

    def features_of(measure: Literal["precision", "recall"]) -> str:
        return measure if is_inception else metric_key(features, measure)

    # fmt: off
    known = {column.key: column for column in (
        Column(key="rfid", paper="rFID", here=f"r{distance}", digits=3),
        Column(key="gfid", paper="gFID", here=f"g{distance}", paper_digits=1),
        Column(key="gfid_fixed", paper="", here=f"g{distance}, base's factor"),
        Column(key="fid", paper="FID", here=distance),
        Column(key="fid_watch", paper="", here=f"{distance} while training, unguided"),
        Column(key="sfid", paper="sFID", here="sfid"),
        Column(key="inception_score", paper="IS", here="inception_score", better="higher", digits=1, paper_digits=1),
        Column(key="precision", paper="precision", here=features_of("precision"), better="higher"),
        Column(key="recall", paper="recall", here=features_of("recall"), better="higher"),
        Column(key="rotation", paper="R(θ) error", here="equivariance_error_rotation", digits=3),
        Column(key="scale", paper="S(s) error", here="equivariance_error_scale", digits=3),
        Column(key="dimension", paper="intrinsic dimension", here="intrinsic_dimension", digits=1, paper_digits=1),
        Column(key="psnr", paper="PSNR, dB", here="psnr_db", better="higher"),
        Column(key="lpips", paper="LPIPS", here="lpips", digits=3, paper_digits=3),
        Column(key="ssim", paper="SSIM", here="ssim", better="higher", digits=3),
    )}
    # fmt: on
    return tuple(known[key] for key in keys)


def _read(run: PlannedRun, key: str, step: int | None) -> object:
    if step is None:
        return run.figures().get(key)
    for record in read_journal(run.folder):
        if record.get("kind") == "validation" and record.get("step") == step:
            return record.get(key)
    return None
