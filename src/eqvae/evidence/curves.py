"""The learning curve of a generator's training run, read from its folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from eqvae.artifacts.files import read_journal, read_json
from eqvae.artifacts.names import AUTOENCODER, CACHE_INDEX, CONFIG, ENVIRONMENT, GENERATOR, GENERATOR_CARD, MODEL_CARD
from eqvae.errors import UserError
from eqvae.generators.families import FAMILIES

CARD = Path(GENERATOR, GENERATOR_CARD)
"""What the exported generator says of itself; runs whose weights were left behind have none."""

MEASURE = ("reference", "features", "num_watch_samples", "watch_steps", "watch_sampler")
"""Fields that say how a curve was measured: they must agree."""

TIMING = ("compile", "gradient_checkpointing", "gradient_accumulation_steps", "shard")
"""Fields that change a run's pace and nothing else."""

FREE = frozenset(
    {"command", "out", "latents", "seed", "device", "max_steps", "log_every", "sample_every", "checkpoint_every",
     "keep_every", "keep_last", "dry_run", "data", "autoencoder", "cache_teacher", "posthoc_ema", "old_latents",
     "reference_image_column", "reference_fingerprint", "reference_moments", "latents_digest", *MEASURE, *TIMING}
)  # fmt: skip
"""Fields that do not decide which arm a run belongs to. The latents' fingerprint does, rather than their folder."""

_FREE_FOR_TWINS = frozenset(
    {"seed", "autoencoder", "out", "device", "num_workers", "log_every", "validate_every", "checkpoint_every",
     "keep_every", "keep_last", "watch", "tensorboard", "dry_run", "compile", "num_statistics_images"}
)  # fmt: skip
"""Fields of a fine-tuning in which autoencoders of one recipe may differ; what it began from is told by its weights."""


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """What one run's validations say."""

    folder: Path
    seed: int

    fields: dict[str, Any]
    """Of the configuration, those that make the arm; a field that is not set is none, as it is of other families."""

    autoencoder: str
    """Short name of the latents' autoencoder."""

    autoencoder_recipe: str
    """How the autoencoder was fine-tuned, but for its seed; empty where nothing says so. See `read_recipe`."""

    autoencoder_seed: tuple[int, ...]
    """Of the fine-tuning; several where one began from another's end."""

    latents: tuple[Any, ...]
    """Mean and deviation that the latents are normalized by; empty where the folder does not say."""

    measure: dict[str, Any]
    """How the distance was measured: `MEASURE`, `metric` (its key), `num_samples`, and `image_size_px` where known."""

    pace: dict[str, Any]
    """Device and whatever else wall time depends on."""

    is_finished: bool
    num_images: Int64[ndarray, " n"]
    """Seen in training up to each validation: steps times batch size."""

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
    card, environment = (read_if_there(path) for path in (folder / CARD, folder / ENVIRONMENT))
    by_step = {record["step"]: record for record in read_journal(folder) if _is_measured(record)}
    records = [by_step[step] for step in sorted(by_step)]
    if not records:
        raise UserError(
            f"'{folder}' holds no measured samples", "Train with --reference, and wait for the first validation"
        )
    batch_size = config.get("batch_size")
    if not isinstance(batch_size, int):
        raise UserError(f"'{folder / CONFIG}' has no batch_size", "Name folders of 'eqvae train'")
    key = _only({_distance_key(record) for record in records}, folder, "distances")
    num_samples = _only({record.get("num_samples") for record in records}, folder, "numbers of samples")
    recipe, autoencoder_seed = read_recipe(_autoencoder_places(config, card))
    size = {"image_size_px": card["image_size_px"]} if "image_size_px" in card else {}
    return TrainingCurve(
        folder=folder,
        seed=int(config.get("seed") or 0),
        fields={name: value for name, value in config.items() if value is not None and name not in FREE},
        autoencoder=autoencoder_name(config, card),
        autoencoder_recipe=recipe,
        autoencoder_seed=autoencoder_seed,
        latents=(*card.get("shift", ()), *card.get("scale", ())),
        measure=_how_drawn(config) | {"metric": key, "num_samples": num_samples, **size},
        pace={"device": environment.get("device"), **{name: config.get(name) for name in TIMING}},
        is_finished=bool(records[-1]["step"] >= (config.get("max_steps") or 0)),
        num_images=np.array([record["step"] * batch_size for record in records], dtype=np.int64),
        training_sec=np.array([record["training_sec"] for record in records], dtype=np.float64),
        values=np.array([record[key] for record in records], dtype=np.float64),
    )


def _how_drawn(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say how samples were drawn; a generator that draws in one pass has no number of steps to agree on."""
    family = next((each for name, each in FAMILIES.items() if str(config.get("recipe")).startswith(f"{name}-")), None)
    takes_steps = family is None or family.draws != "pass"
    return {name: config.get(name) for name in MEASURE if takes_steps or name not in ("watch_steps", "watch_sampler")}


def read_recipe(places: Sequence[Path], known: frozenset[Path] = frozenset()) -> tuple[str, tuple[int, ...]]:
    """Tell from the first card among folders how an autoencoder was fine-tuned: twins differ in their seeds alone.

    Where it was fine-tuned from another fine-tuned one, that one's recipe and seed are part of its own.
    """
    found = [folder / MODEL_CARD for place in places for folder in (place, place / AUTOENCODER)]
    path = next((path for path in found if path.is_file()), None)
    card = {} if path is None or path.resolve() in known else read_json(path)
    if path is None or not isinstance(card.get("recipe"), dict):
        return "", ()
    base, base_seeds = read_recipe([Path(str(card.get("base")))], known | {path.resolve()})
    own = {name: value for name, value in card["recipe"].items() if name not in _FREE_FOR_TWINS}
    named = {"recipe": own, "num_steps": card.get("num_steps"), "base": base or card.get("base_fingerprint")}
    return json.dumps(named, sort_keys=True), (*base_seeds, int(card["recipe"].get("seed") or 0))


def _autoencoder_places(config: Mapping[str, Any], card: Mapping[str, Any]) -> list[Path]:
    """Where the autoencoder of a run's latents may lie."""
    index = read_if_there(Path(str(config.get("latents", ""))) / CACHE_INDEX)
    return [Path(str(each["autoencoder"])) for each in (config, card, index) if each.get("autoencoder")]


def autoencoder_name(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """Name the autoencoder of a run's latents."""
    named = card.get("autoencoder", config.get("autoencoder"))
    return short_name(named) if named is not None else Path(str(config.get("latents", "latents"))).name


def short_name(source: Any) -> str:
    """Shorten a path to its last telling part; presets and hub ids stay as they are."""
    path = Path(str(source))
    if path.name == AUTOENCODER and path.parent.name:
        return path.parent.name
    return path.name if path.is_absolute() or str(source).startswith(".") or path.exists() else str(source)


def read_if_there(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty where there is none."""
    return read_json(path) if path.exists() else {}


def finite(value: Any) -> float | None:
    """Let finite numbers pass."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _is_measured(record: Mapping[str, Any]) -> bool:
    """Whether a record is a validation with a distance; contact sheets alone leave records without one."""
    is_validation = record.get("kind") == "validation" and isinstance(record.get("step"), int)
    return is_validation and (finite(record.get("training_sec")) or 0.0) > 0.0 and bool(_distance_key(record))


def _distance_key(record: Mapping[str, Any]) -> str:
    """The key of the record's Frechet distance; empty where it has none."""
    keys = (key for key in record if key == "fid" or key.startswith("fd_"))
    return next((key for key in keys if finite(record[key]) is not None), "")


def _only(found: set[Any], folder: Path, what: str) -> Any:
    if len(found) > 1:
        listed = ", ".join(sorted(map(str, found)))
        raise UserError(f"'{folder}' was measured with different {what} ({listed})", "Compare runs of one measure only")
    return found.pop()
