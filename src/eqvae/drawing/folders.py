"""The output folders that a report draws, each read into a record of its kind."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from eqvae.artifacts.files import read_journal, read_json
from eqvae.artifacts.names import (
    CONFIG,
    CONTACT_SHEETS,
    ENVIRONMENT,
    JOURNAL,
    METRICS,
    PICTURES,
    SAMPLE_SHEET,
    SPECTRUM,
)
from eqvae.artifacts.records import Pictures
from eqvae.errors import UserError
from eqvae.evidence.curves import CARD, autoencoder_name, read_if_there, short_name

CONDITIONS = {
    "data": None, "image_size": None, "interpolation": None, "antialias": None, "precision": "fp32", "tile": None,
    "black": None, "white": None,
}  # fmt: skip
"""Entries of an evaluation's config that must agree before its figures may be compared with another's, and what holds
for one that does not say. Features are none of them: whatever they decide has their name in its key."""

MAX_MESSAGES = 5
"""Broken images and watchdog's messages that are shown singly."""

DRAWN = "'eqvae evaluate', 'finetune', 'train', 'sample' and 'score'"


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Radially averaged power of latents and of images at their resolution; white noise has 1 at every frequency."""

    frequency: Float64[ndarray, " n"]
    """Cycles per latent cell, rising, in (0, 0.5]."""

    latent_power: Float64[ndarray, " n"]
    image_power: Float64[ndarray, " n"]

    @property
    def latent_db(self) -> Float64[ndarray, " n"]:
        """The latents' power; 0 dB is white noise of their own variance."""
        return 10.0 * np.log10(self.latent_power)

    @property
    def image_db(self) -> Float64[ndarray, " n"]:
        """The images' power; 0 dB is white noise of their own variance."""
        return 10.0 * np.log10(self.image_power)

    @classmethod
    def read(cls, path: Path) -> "Spectrum":
        """Read the frequencies at which both have power."""
        content = read_json(path)
        try:
            keys = ("frequency", "latent_power", "image_power")
            curves = np.array([content[key] for key in keys], dtype=np.float64)
        except (KeyError, TypeError, ValueError):
            curves = np.empty(0)
        curves = curves[:, (curves > 0).all(0)] if curves.ndim == 2 and np.isfinite(curves).all() else np.empty((3, 0))
        if not curves.size:
            raise UserError(f"'{path}' holds no power spectrum", "Run 'eqvae evaluate' again")
        frequency, latent_power, image_power = curves
        return cls(frequency=frequency, latent_power=latent_power, image_power=image_power)


@dataclass(frozen=True, kw_only=True)
class OutputFolder:
    """What a command has left in its folder so far; where a file is missing, its entry is empty."""

    folder: Path

    name: str
    """As tables and figures print it."""

    config: dict[str, Any]
    environment: dict[str, Any]

    journal: list[dict[str, Any]]
    """Records of several kinds."""

    metrics: dict[str, Any]
    """Flat keys with unit suffixes."""

    TITLE: ClassVar[str]

    NEEDS: ClassVar[tuple[str, ...]] = ()
    """Files without which the command has not finished, and the folder can't be drawn."""

    @classmethod
    def own(cls, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """The name, and what only folders of this kind have."""
        return {"name": folder.name}

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Pick the records of one kind, by step; of two of one step, which a resumption leaves, the later counts."""
        found = [record for record in self.journal if record.get("kind") == kind]
        by_step = {record["step"]: record for record in found if isinstance(record.get("step"), int)}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def step(self) -> int:
        """The last that is known of."""
        return max(
            (record["step"] for kind in ("train", "validation") for record in self.records(kind)[-1:]), default=0
        )

    @property
    def is_finished(self) -> bool:
        """Whether it has its figures, after all steps; a run that is made longer is unfinished again."""
        wanted = sum(int(self.config.get(name) or 0) for name in ("max_steps", "polish_steps"))
        return bool(self.metrics) and self.step >= wanted

    @property
    def messages(self) -> list[str]:
        """What went wrong: broken images in one line, and the first few of the watchdog's words."""
        named = [record for record in self.journal if record.get("kind") == "broken_image"]
        broken = list(dict.fromkeys(str(record.get("name") or record.get("message") or "unnamed") for record in named))
        lines = []
        if broken:
            count = "1 broken image was" if len(broken) == 1 else f"{len(broken)} broken images were"
            more = ", …" if len(broken) > MAX_MESSAGES else ""
            lines.append(f"{count} left out: {', '.join(broken[:MAX_MESSAGES])}{more}.")
        barked = [record for record in self.journal if record.get("kind") == "watchdog"]
        lines += [f"At step {record.get('step', '?')}: {record.get('message', '')}" for record in barked[:MAX_MESSAGES]]
        if len(barked) > MAX_MESSAGES:
            lines.append(f"The journal holds {len(barked) - MAX_MESSAGES} more messages of the watchdog.")
        return lines


@dataclass(frozen=True, kw_only=True)
class Evaluation(OutputFolder):
    """What `eqvae evaluate` left; named after the autoencoder."""

    pictures: Pictures | None
    spectrum: Spectrum | None

    TITLE, NEEDS = "Evaluation of", (METRICS,)

    @classmethod
    def own(cls, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        path = folder / PICTURES
        pictures = Pictures.read(path) if path.exists() else None
        # The folder may have been written anew without --all since.
        has_spectrum = (folder / SPECTRUM).exists() and config.get("all") is not False
        return {
            "name": short_name(config.get("autoencoder", folder.name)),
            "pictures": pictures,
            "spectrum": Spectrum.read(folder / SPECTRUM) if has_spectrum else None,
        }

    @property
    def conditions(self) -> dict[str, Any]:
        """What was measured and how; equal for evaluations that may be compared."""
        known = {key: self.config.get(key, default) for key, default in CONDITIONS.items()}
        return {**known, "num_images": self.metrics.get("num_images")}

    def describe_conditions(self) -> str:
        """For example `100 images of photos, 256 px, bicubic`."""
        found = self.conditions
        count = f"{found['num_images']:g} images" if found["num_images"] is not None else "images"
        parts = [count + (f" of {short_name(found['data'])}" if found["data"] is not None else "")]
        parts += [f"{found['image_size']} px"] if found["image_size"] is not None else []
        filtering = " with antialias" if found["antialias"] else ""
        parts += [f"{found['interpolation']}{filtering}"] if found["interpolation"] is not None else []
        parts += [found["precision"]] if found["precision"] != CONDITIONS["precision"] else []
        return ", ".join(parts)

    @property
    def origin(self) -> Path | None:
        """The fine-tuning run that the autoencoder lies in; a nicety, so anything unexpected there is no run."""
        path = Path(str(self.config.get("autoencoder", ""))).resolve()
        for folder in (path, path.parent):
            if (folder / JOURNAL).exists() and (folder / CONFIG).exists():
                try:
                    return folder if read_json(folder / CONFIG).get("command") == "finetune" else None
                except UserError:
                    return None
        return None


@dataclass(frozen=True, kw_only=True)
class FineTuning(OutputFolder):
    """What `eqvae finetune` has left so far; named after its folder."""

    TITLE = "Fine-tuning run:"


@dataclass(frozen=True, kw_only=True)
class Training(OutputFolder):
    """What `eqvae train` has left so far; named like `dit-ti-2 on tiny-kl`."""

    card: dict[str, Any]
    """What the exported generator says of itself; empty before its first export."""

    sheets: dict[int, Path]
    """Contact sheets by their step, which rises."""

    TITLE = "Training run:"

    @classmethod
    def own(cls, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        card = read_if_there(folder / CARD)
        found = {path.stem.removeprefix("step_"): path for path in (folder / CONTACT_SHEETS).glob("step_*.png")}
        sheets = {int(step): path for step, path in found.items() if step.isdigit()}
        name = f"{config.get('recipe', 'generator')} on {autoencoder_name(config, card)}"
        return {"name": name, "card": card, "sheets": dict(sorted(sheets.items()))}

    @property
    def step(self) -> int:
        """The last that is known of."""
        return max([super().step, *self.sheets])

    def num_images(self, step: int) -> int | None:
        """Count the images that training has seen."""
        batch_size = self.config.get("batch_size")
        return step * batch_size if isinstance(batch_size, int) else None


@dataclass(frozen=True, kw_only=True)
class SampleSet(OutputFolder):
    """What `eqvae sample` left; named after its folder."""

    TITLE, NEEDS = "Samples:", (METRICS, SAMPLE_SHEET)

    @property
    def card(self) -> dict[str, Any]:
        """What the generator says of itself."""
        return _section(self.config, "generator")


@dataclass(frozen=True, kw_only=True)
class Score(OutputFolder):
    """What `eqvae score` left; named after the samples."""

    TITLE, NEEDS = "Score of", (METRICS,)

    @classmethod
    def own(cls, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        path = Path(str(config.get("samples", "")))
        is_own = path.suffix != ".npz"  # what `eqvae sample` wrote has its folder's name; an archive its own
        name = path.name if is_own else (path.stem == "samples" and path.parent.name) or path.stem
        return {"name": name or folder.name}

    @property
    def reference(self) -> dict[str, Any]:
        """Where the reference comes from: `data`, `fingerprint`, `features`, ...; empty where the folder is silent."""
        return _section(_section(self.metrics, "provenance"), "reference")

    @property
    def conditions(self) -> dict[str, Any]:
        """What was measured and how; equal for scores that may be compared."""
        known = _section(self.metrics, "provenance")
        settings = {name: value for name, value in known.items() if name not in ("samples", "left_out")}
        counts = {name: self.metrics.get(name) for name in ("num_samples", "num_reference")}
        return {**settings, **counts, "reference": self.reference or self.config.get("reference")}


KINDS: dict[str, type[OutputFolder]] = {
    "evaluate": Evaluation,
    "finetune": FineTuning,
    "train": Training,
    "sample": SampleSet,
    "score": Score,
}
"""By the command that writes them."""


class Contents(NamedTuple):
    """All that a report shows, each kind in the order of the folders and with distinct names."""

    evaluations: list[Evaluation]
    runs: list[FineTuning]
    trainings: list[Training]
    sample_sets: list[SampleSet]
    scores: list[Score]


def read_folders(folders: Sequence[Path]) -> Contents:
    """Read what earlier stages saved; the run that made an evaluated autoencoder is found through its path."""
    if not folders:
        raise UserError("No folder to report on", f"Name the output folders of {DRAWN}")
    found: dict[str, list[Any]] = {command: [] for command in KINDS}
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        config = _read_config(folder)
        found[config["command"]].append(_read(KINDS[config["command"]], folder, config))
    known = {run.folder for run in found["finetune"]}
    for origin in dict.fromkeys(evaluation.origin for evaluation in found["evaluate"]):
        if origin is not None and origin not in known:
            found["finetune"].append(_read(FineTuning, origin, _read_config(origin)))
    by_folder, by_folder_above = attrgetter("name"), attrgetter("parent.name")  # some are named after their folder
    return Contents(
        evaluations=_with_distinct_names(found["evaluate"], by_folder),
        runs=_with_distinct_names(found["finetune"], by_folder_above),
        trainings=_with_distinct_names(found["train"], by_folder),
        sample_sets=_with_distinct_names(found["sample"], by_folder_above),
        scores=_with_distinct_names(found["score"], by_folder),
    )


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _read(kind: type[OutputFolder], folder: Path, config: dict[str, Any]) -> OutputFolder:
    for name in kind.NEEDS:
        if not (folder / name).exists():
            raise UserError(f"The folder '{folder}' has no {name}", f"Let 'eqvae {config['command']}' finish first")
    return kind(
        folder=folder,
        config=config,
        environment=read_if_there(folder / ENVIRONMENT),
        journal=read_journal(folder),
        metrics=read_if_there(folder / METRICS),
        **kind.own(folder, config),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"The folder '{folder}' does not exist", "Check the path")
    config = read_json(folder / CONFIG)
    if config.get("command") not in KINDS:
        owner = f"was written by 'eqvae {config['command']}'" if "command" in config else "holds something else"
        raise UserError(f"'{folder}' {owner}", f"A report draws the folders of {DRAWN}")
    return config


Named = TypeVar("Named", bound=OutputFolder)


def _with_distinct_names(items: list[Named], tell_apart: Callable[[Path], str]) -> list[Named]:
    """Mark items of the same name by a part of their folders' paths, or by all of it where that does not do."""
    count = Counter(item.name for item in items)
    short = [f"{item.name} ({tell_apart(item.folder)})" if count[item.name] > 1 else item.name for item in items]
    full = [f"{item.name} ({item.folder})" for item in items]
    names = short if len(set(short)) == len(short) else full
    return [replace(item, name=name) for item, name in zip(items, names, strict=True)]
