"""Folders of evaluations and fine-tuning runs, read into records."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqvae.artifacts import (
    AUTOENCODER,
    CONFIG,
    ENVIRONMENT,
    JOURNAL,
    METRICS,
    PICTURES,
    SPECTRUM,
    Pictures,
    read_journal,
    read_json,
)
from eqvae.errors import UserError
from eqvae.report.spectrum import Spectrum

CONDITIONS = {"data": None, "image_size": None, "interpolation": None, "antialias": None, "precision": "fp32"}
"""Entries of an evaluation's config that must agree before its figures may be compared with another's, and what holds
for one that does not say. Features are none of them: whatever they decide has their name in its key."""

MAX_MESSAGES = 5
"""Broken images and watchdog's messages that are shown singly."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `eqvae evaluate` left in its folder."""

    folder: Path

    name: str
    """The autoencoder, as tables and figures print it."""

    config: dict[str, Any]

    environment: dict[str, Any]

    metrics: dict[str, Any]
    """Flat keys with unit suffixes."""

    pictures: Pictures | None
    """None where the folder has none."""

    spectrum: Spectrum | None
    """None where the folder has none."""

    journal: list[dict[str, Any]]
    """Images that could not be read."""

    @property
    def num_channels(self) -> int:
        """Channels of the latent; 0 where the folder does not say."""
        if self.pictures is not None:
            return self.pictures.latents.shape[1]
        return sum(key.removeprefix("latent_mean_").isdigit() for key in self.metrics)

    @property
    def conditions(self) -> dict[str, Any]:
        """What was measured and how; equal for evaluations that may be compared."""
        known = {key: self.config.get(key, default) for key, default in CONDITIONS.items()}
        return {**known, "num_images": self.metrics.get("num_images")}

    def describe_conditions(self) -> str:
        """For example `100 images of photos, 256 px, bicubic`."""
        found = self.conditions
        count = f"{found['num_images']:g} images" if found["num_images"] is not None else "images"
        source = f" of {short_name(found['data'])}" if found["data"] is not None else ""
        size = f", {found['image_size']} px" if found["image_size"] is not None else ""
        resizing = f", {found['interpolation']}" if found["interpolation"] is not None else ""
        filtering = " with antialias" if found["antialias"] else ""
        precision = f", {found['precision']}" if found["precision"] != CONDITIONS["precision"] else ""
        return f"{count}{source}{size}{resizing}{filtering}{precision}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `eqvae finetune` has left in its folder so far."""

    folder: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]

    journal: list[dict[str, Any]]
    """One record for each logged step, of several kinds."""

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Pick the records of one kind."""
        return records_of(self.journal, kind)


def records_of(journal: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Pick the records of one kind out of a run's journal."""
    found = [record for record in journal if record.get("kind") == kind]
    by_step = {record["step"]: record for record in found if isinstance(record.get("step"), int)}
    return [by_step[step] for step in sorted(by_step)]


def messages(journal: Sequence[dict[str, Any]]) -> list[str]:
    """Say what went wrong: broken images in one line, and the first few of the watchdog's words."""
    named = [record for record in journal if record.get("kind") == "broken_image"]
    broken = list(dict.fromkeys(str(record.get("name") or record.get("message") or "unnamed") for record in named))
    lines = []
    if broken:
        count = "1 broken image was" if len(broken) == 1 else f"{len(broken)} broken images were"
        more = ", …" if len(broken) > MAX_MESSAGES else ""
        lines.append(f"{count} left out: {', '.join(broken[:MAX_MESSAGES])}{more}.")
    barked = [record for record in journal if record.get("kind") == "watchdog"]
    lines += [f"At step {record.get('step', '?')}: {record.get('message', '')}" for record in barked[:MAX_MESSAGES]]
    if len(barked) > MAX_MESSAGES:
        lines.append(f"The journal holds {len(barked) - MAX_MESSAGES} more messages of the watchdog.")
    return lines


def comparable_groups(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Gather the evaluations that were made under the same conditions: only those share a chart."""
    groups: list[list[Evaluation]] = []
    for item in evaluations:
        for group in groups:
            if group[0].conditions == item.conditions:
                group.append(item)
                break
        else:
            groups.append([item])
    return groups


def short_name(source: Any) -> str:
    """Shorten a path to its last telling part; presets and hub ids stay as they are."""
    path = Path(str(source))
    if path.name == AUTOENCODER and path.parent.name:
        return path.parent.name
    return path.name if path.is_absolute() or str(source).startswith(".") or path.exists() else str(source)


def read_evaluation(folder: Path, config: dict[str, Any]) -> Evaluation:
    """Read what `eqvae evaluate` left."""
    if not (folder / METRICS).exists():
        raise UserError(f"The evaluation in '{folder}' has no {METRICS}", "Let 'eqvae evaluate' finish first")
    # The folder may have been written anew without --all since.
    has_spectrum = (folder / SPECTRUM).exists() and config.get("all") is not False
    path = folder / PICTURES
    try:
        pictures = Pictures.read(path) if path.exists() else None
    except KeyError as error:
        raise UserError(f"'{path}' lacks the entry {error}", "Run 'eqvae evaluate' again") from None
    return Evaluation(
        folder=folder,
        name=short_name(config.get("autoencoder", folder.name)),
        config=config,
        environment=read_environment(folder),
        metrics=read_json(folder / METRICS),
        pictures=pictures,
        spectrum=Spectrum.read(folder / SPECTRUM) if has_spectrum else None,
        journal=read_journal(folder),
    )


def read_run(folder: Path, config: dict[str, Any]) -> Run:
    """Read what `eqvae finetune` has left so far."""
    return Run(
        folder=folder,
        name=folder.name,
        config=config,
        environment=read_environment(folder),
        journal=read_journal(folder),
    )


def read_environment(folder: Path) -> dict[str, Any]:
    """Read what a command says of the machine it ran on."""
    return read_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).exists() else {}


def originating_run(evaluation: Evaluation) -> Path | None:
    """Find the run that the evaluated autoencoder lies in; a nicety, so anything unexpected there is no run."""
    path = Path(str(evaluation.config.get("autoencoder", ""))).resolve()
    for folder in (path, path.parent):
        if (folder / JOURNAL).exists() and (folder / CONFIG).exists():
            try:
                is_run = read_json(folder / CONFIG).get("command") == "finetune"
            except UserError:
                is_run = False
            return folder if is_run else None
    return None
