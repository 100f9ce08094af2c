"""`eqvae reproduce headline`: how much sooner generators learn EQ-VAE's latents, in one file that the README reads.

The base of a speed-up is the control: the same fine-tuning, polished alike, without tau (Table 6). What differs between
the two is equivariance alone, not that an autoencoder has seen these images. The paper's own comparison, with the base
as it was, stands beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eqvae.artifacts.files import to_plain, write_json, write_text
from eqvae.drawing.tables import MISSING, markdown_table, with_minus_sign
from eqvae.evidence.arms import Arm as MeasuredArm
from eqvae.evidence.arms import draw_seeds, final_difference
from eqvae.evidence.curves import read_curve
from eqvae.evidence.speed_up import headline as speed_up
from eqvae.paper.arms import Arm, equivariant, more_training
from eqvae.paper.cells import Cell, by_seed, evaluation_cells, score_cells
from eqvae.paper.plan import PlannedAutoencoder, PlannedRun
from eqvae.paper.setting import Family, Setting

HEADLINE = "headline"
"""`headline.json` and `headline.md`."""

NAMES: Mapping[Family, str] = {"sit": "SiT", "dit": "DiT", "repa-sit": "SiT + REPA", "maskgit": "MaskGIT, on tokens"}

_CONTROL, _BASE, _OURS = "control", "base", "eq"

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an arm's runs measure: planned once, read after each run."""

    name: str

    trained: tuple[PlannedRun, ...]
    """By autoencoder, by seed."""

    num_seeds: int

    samples: Mapping[str, Mapping[str, Cell]]
    """Of sample sets, `unguided` and `guided`; MaskGIT's are always guided."""

    autoencoder: Mapping[str, Cell]

    @classmethod
    def of(cls, arm: Arm) -> "Measured":
        """Plan an arm."""
        return cls(
            name=arm.autoencoder.name,
            trained=arm.trained,
            num_seeds=len(arm.setting.seeds),
            samples={kind: score_cells(arm, guided=kind == "guided") for kind in _kinds(arm)},
            autoencoder=evaluation_cells(arm.setting, arm.autoencoder),
        )

    def curves(self) -> MeasuredArm | None:
        """Read the learning curves that are finished, with the seeds that the plan knows."""
        curves = [
            replace(read_curve(run.folder), autoencoder_seed=(place // self.num_seeds,))
            for place, run in enumerate(self.trained)
            if run.is_finished
        ]
        return MeasuredArm(name=self.name, runs=tuple(curves)) if curves else None


def _kinds(arm: Arm) -> tuple[str, ...]:
    is_always_guided = arm.setting.sampling[arm.family].guidance_scale != 1.0
    return ("guided",) if is_always_guided else ("unguided", "guided")


@dataclass(frozen=True, kw_only=True)
class HeadlineItem:
    """The headline to reproduce: of each family the base, the control and ours."""

    scale: str

    arms: Mapping[Family, Mapping[str, Measured]]

    runs: tuple[PlannedRun, ...]
    """Evaluations, then learning curves of all families seed by seed, then their sample sets."""

    item: str = HEADLINE

    def figures(self) -> dict[str, Record | None]:
        """Sum up each family by what is finished so far; None where that is no comparison yet."""
        return {family: _family_record(arms) for family, arms in self.arms.items()}

    def write(self, root: Path) -> list[Path]:
        """Write the record and the page."""
        files, figures = [root / f"{HEADLINE}.{suffix}" for suffix in ("json", "md")], self.figures()
        write_json(files[0], figures | {"scale": self.scale})
        write_text(files[1], "\n".join(_page(figures, self.scale)) + "\n")
        return files


def headline(setting: Setting) -> HeadlineItem:
    """Plan the longest learning curves of all families, and sample sets at their ends."""
    tuned: dict[str, Mapping[str, PlannedAutoencoder]] = {}
    for name in ("SD-VAE", "VQ-GAN"):
        base = setting.autoencoders[name]
        control, ours = more_training(setting, base), equivariant(setting, base)
        tuned[name] = {_BASE: setting.base(base), _CONTROL: control, _OURS: ours}
    arms = {
        family: {
            label: Measured.of(Arm(setting=setting, family=family, size="xl", autoencoder=autoencoder))
            for label, autoencoder in tuned["VQ-GAN" if family == "maskgit" else "SD-VAE"].items()
        }
        for family in NAMES
    }
    each = [arm for of_family in arms.values() for arm in of_family.values()]
    stages = (
        [cell.runs for arm in each for cell in arm.autoencoder.values()],
        [arm.trained for arm in each],
        [cell.runs for arm in each for cells in arm.samples.values() for cell in cells.values()],
    )
    return HeadlineItem(
        scale=setting.name, arms=arms, runs=tuple(run for stage in stages for run in by_seed(stage))
    )  # fmt: skip


def readme_rows(figures: Mapping[str, Any]) -> list[str]:
    """Say each family's speed-up as a row of the README's table; families without one are left out."""
    rows = []
    for family, name in NAMES.items():
        found = figures.get(family)
        if not found:
            continue
        low, high = (MISSING if found[side] is None else f"{found[side]:.2f}" for side in ("low", "high"))
        interval = f" ({low} to {high})" if found["low"] is not None or found["high"] is not None else ""
        sign = {"at_least": "at least ", "at_most": "less than "}.get(found["bound"], "")
        shown = f"the control's quality after {sign}**{found['speed_up']:.2f} times**{interval} fewer images"
        rows.append(f"| {name} | {'the speed-up could not be told' if found['bound'] == 'unknown' else shown} |")
    return rows


def _family_record(arms: Mapping[str, Measured]) -> Record | None:
    curves = {label: arm.curves() for label, arm in arms.items()}
    against = {label: _speed_up(curves[label], curves[_OURS]) for label in (_CONTROL, _BASE)}
    if (against_control := against[_CONTROL]) is None:
        return None
    return {
        **against_control,
        "against_base": against[_BASE],
        "samples": {
            label: {kind: _means(cells) for kind, cells in arm.samples.items()} for label, arm in arms.items()
        },
        "autoencoders": {label: _means(arm.autoencoder) for label, arm in arms.items()},
    }  # fmt: skip


def _speed_up(base: MeasuredArm | None, ours: MeasuredArm | None) -> Record | None:
    """Compare learning curves at the quality that the base ends with."""
    if base is None or ours is None:
        return None
    images = speed_up(base.by_images(), ours.by_images(), draw_seeds(base, ours))
    interval = images.interval
    return {
        "speed_up": images.ratio,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "bound": images.bound,
        "against": base.name,
        "quality": images.level,
        "num_images": {"base": images.base_at, "arm": images.arm_at},
        "num_seeds": min(len(set(arm.seeds)) for arm in (base, ours)),
        "num_autoencoders": ours.num_autoencoders,
        "final_difference": to_plain(final_difference(base, ours)),
    }


def _means(cells: Mapping[str, Cell]) -> dict[str, float]:
    """Average what is measured so far, under the names of `metrics.json`."""
    values = {cell.key: cell.values() for cell in cells.values()}
    return {key: float(np.mean(each)) for key, each in values.items() if each}


def _page(figures: Mapping[str, Record | None], scale: str) -> list[str]:
    lines = [
        "# How much sooner generators learn EQ-VAE's latents", "",
        f"Scale `{scale}`. The control is the same fine-tuning without tau; 95% intervals over autoencoders and seeds.",
        "", "| on EQ-VAE's latents | |", "|---|---|", *readme_rows(figures), "",
    ]  # fmt: skip
    missing = [name for family, name in NAMES.items() if figures[family] is None]
    lines += [f"Without finished runs so far: {', '.join(missing)}.", ""] if missing else []
    for family, name in NAMES.items():
        if found := figures[family]:
            lines += [f"## {name}", "", *_details(found)]
    return lines


def _details(found: Record) -> list[str]:
    """The comparison with the base as it was, the difference at the end, and what lies behind both."""
    lines = []
    for each in (found, found["against_base"]):
        if each is not None and (final := each["final_difference"]):
            interval = final["interval"]
            sides = "no interval" if interval is None else f"{interval['low']:+.2f} to {interval['high']:+.2f}"
            change = with_minus_sign(f"{final['difference']:+.2f} ({sides})")
            times = f"{each['speed_up']:.2f} times ({each['bound'].replace('_', ' ')})"
            lines.append(f"Against {each['against']}: {times}; after {final['num_images']:,} images {change}.")
    rows = [
        (label, kind, *(f"{key} {value:.4g}" for key, value in measured.items()))
        for label, kinds in found["samples"].items() for kind, measured in kinds.items() if measured
    ]  # fmt: skip
    width = max(map(len, rows), default=0)
    if not rows:
        return ["\n\n".join(lines), ""]
    names = ("latents", "samples", *("" for _ in range(width - 2)))
    return ["\n\n".join(lines), "", markdown_table(names, _filled(rows, width), num_text_columns=width), ""]


def _filled(rows: Sequence[tuple[str, ...]], width: int) -> list[tuple[str, ...]]:
    return [(*row, *("" for _ in range(width - len(row)))) for row in rows]
