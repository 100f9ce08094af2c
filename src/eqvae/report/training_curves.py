"""The learning curve of a generator's training run, read from its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from eqvae.artifacts import CONFIG, read_journal, read_json
from eqvae.errors import UserError
from eqvae.report.folders import read_environment, short_name
from eqvae.report.tables import finite

CARD = Path("generator", "generator.json")
"""What the exported generator says of itself; runs whose weights were left behind have none."""

MEASURE = ("reference", "features", "num_watch_samples", "watch_steps")
"""Fields that say how a curve was measured: they must agree."""

TIMING = ("compile", "gradient_checkpointing", "gradient_accumulation_steps")
"""Fields that change a run's pace and nothing else."""

FREE = frozenset(
    {"command", "out", "latents", "seed", "device", "max_steps", "log_every", "sample_every", "checkpoint_every",
     "dry_run", "data", "autoencoder", "cache_teacher", "posthoc_ema", *MEASURE, *TIMING}
)  # fmt: skip
"""Fields that do not decide which arm a run belongs to. The latents' fingerprint does, rather than their folder."""


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """What one run's validations say."""

    folder: Path
    """As the user gave it."""

    seed: int

    fields: dict[str, Any]
    """Of the configuration, those that make the arm."""

    autoencoder: str
    """Short name of the latents' autoencoder."""

    latents: tuple[Any, ...]
    """Mean and deviation that the latents are normalized by; empty where the folder does not say."""

    measure: dict[str, Any]
    """How the distance was measured: `MEASURE`, `metric` (its key), `num_samples`, and `image_size_px` where known."""

    pace: dict[str, Any]
    """Device and whatever else wall time depends on."""

    is_finished: bool

    steps: Int64[ndarray, " n"]
    num_images: Int64[ndarray, " n"]
    """Seen in training: steps times batch size."""

    training_sec: Float64[ndarray, " n"]
    """Spent in training steps, over all sessions of the run."""

    values: Float64[ndarray, " n"]
    """Frechet distance."""


def read_curve(folder: Path) -> TrainingCurve:
    """Read one run, finished or not."""
    if not folder.is_dir():
        raise UserError(f"The folder '{folder}' does not exist", "Check the path")
    config = read_json(folder / CONFIG)
    if config.get("command") != "train":
        owner = f"was written by 'eqvae {config['command']}'" if "command" in config else "is no training run"
        raise UserError(f"'{folder}' {owner}", "Name folders of 'eqvae train'")
    card = read_card(folder)
    by_step = {record["step"]: record for record in read_journal(folder) if _is_validation(record)}
    records = [by_step[step] for step in sorted(by_step)]
    if not records:
        raise UserError(
            f"'{folder}' holds no measured samples", "Train with --reference, and wait for the first validation"
        )
    batch_size = config.get("batch_size")
    if not isinstance(batch_size, int):
        raise UserError(f"'{folder / CONFIG}' has no batch_size", "Name folders of 'eqvae train'")
    key = _only({_distance(record) for record in records}, folder, "distances")
    measure = {name: config.get(name) for name in MEASURE} | {
        "metric": key,
        "num_samples": _only({record.get("num_samples") for record in records}, folder, "numbers of samples"),
    }
    if "image_size_px" in card:
        measure["image_size_px"] = card["image_size_px"]
    steps = np.array([record["step"] for record in records], dtype=np.int64)
    return TrainingCurve(
        folder=folder,
        seed=int(config.get("seed", 0)),
        fields={name: value for name, value in config.items() if name not in FREE},
        autoencoder=autoencoder_name(config, card),
        latents=(*card.get("shift", ()), *card.get("scale", ())),
        measure=measure,
        pace={"device": read_environment(folder).get("device"), **{name: config.get(name) for name in TIMING}},
        is_finished=bool(steps[-1] >= config.get("max_steps", 0)),
        steps=steps,
        num_images=steps * batch_size,
        training_sec=np.array([record["training_sec"] for record in records], dtype=np.float64),
        values=np.array([record[key] for record in records], dtype=np.float64),
    )


def read_card(folder: Path) -> dict[str, Any]:
    """Read what the exported generator says of itself."""
    return read_json(folder / CARD) if (folder / CARD).exists() else {}


def autoencoder_name(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """Name the autoencoder of a run's latents."""
    named = card.get("autoencoder", config.get("autoencoder"))
    return short_name(named) if named is not None else Path(str(config.get("latents", "latents"))).name


def _is_validation(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a measured distance; contact sheets alone leave records without one."""
    return (
        record.get("kind") == "validation"
        and isinstance(record.get("step"), int)
        and (finite(record.get("training_sec")) or 0.0) > 0.0
        and bool(_distance(record))
    )


def _distance(record: Mapping[str, Any]) -> str:
    """The key of the record's Frechet distance; empty where it has none."""
    keys = (key for key in record if key == "fid" or key.startswith("fd_"))
    return next((key for key in keys if finite(record[key]) is not None), "")


def _only(found: set[Any], folder: Path, what: str) -> Any:
    if len(found) > 1:
        listed = ", ".join(sorted(map(str, found)))
        raise UserError(f"'{folder}' was measured with different {what} ({listed})", "Compare runs of one measure only")
    return found.pop()
