"""Folders of generators, read into records: training runs, sample sets, scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqvae.artifacts import METRICS, read_journal, read_json
from eqvae.errors import UserError
from eqvae.report.folders import read_environment, records_of
from eqvae.report.training_curves import autoencoder_name, read_card

STAGES = "samples"
"""Folder of a training run's contact sheets."""

SHEET = "samples.png"
"""Contact sheet of a sample set."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What `eqvae train` has left in its folder so far."""

    folder: Path

    name: str
    """For example `dit-ti-2 on tiny-kl`."""

    config: dict[str, Any]
    environment: dict[str, Any]
    journal: list[dict[str, Any]]

    metrics: dict[str, Any]
    """Empty where the run is not finished."""

    card: dict[str, Any]
    """What the exported generator says of itself; empty before its first export."""

    sheets: dict[int, Path]
    """Contact sheets by their step, which rises."""

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Pick the records of one kind."""
        return records_of(self.journal, kind)

    @property
    def step(self) -> int:
        """The last that is known of."""
        steps = [record["step"] for kind in ("train", "validation") for record in self.records(kind)[-1:]]
        return max([*steps, *self.sheets], default=0)

    @property
    def is_finished(self) -> bool:
        """Whether it has taken all its steps; a run that is made longer is unfinished again."""
        return bool(self.metrics) and self.step >= int(self.config.get("max_steps", 0))

    def num_images(self, step: int) -> int | None:
        """Count the images that training has seen."""
        batch_size = self.config.get("batch_size")
        return step * batch_size if isinstance(batch_size, int) else None


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """What `eqvae sample` left in its folder."""

    folder: Path

    name: str
    """The folder's."""

    config: dict[str, Any]
    """With the generator's card."""

    environment: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def sheet(self) -> Path:
        """The contact sheet."""
        return self.folder / SHEET

    @property
    def card(self) -> dict[str, Any]:
        """What the generator says of itself."""
        found = self.config.get("generator")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True, kw_only=True)
class Score:
    """What `eqvae score` left in its folder."""

    folder: Path

    name: str
    """The samples'."""

    config: dict[str, Any]
    environment: dict[str, Any]

    journal: list[dict[str, Any]]
    """Images of the reference that could not be read."""

    metrics: dict[str, Any]
    """Flat keys, and `provenance`."""

    @property
    def reference(self) -> dict[str, Any]:
        """Where the reference comes from: `data`, `fingerprint`, `features`, ...; empty where the folder is silent."""
        found = self._provenance.get("reference")
        return found if isinstance(found, dict) else {}

    @property
    def conditions(self) -> dict[str, Any]:
        """What was measured and how; equal for scores that may be compared."""
        settings = {name: value for name, value in self._provenance.items() if name not in ("samples", "left_out")}
        counts = {name: self.metrics.get(name) for name in ("num_samples", "num_reference")}
        return {**settings, **counts, "reference": self.reference or self.config.get("reference")}

    @property
    def _provenance(self) -> dict[str, Any]:
        found = self.metrics.get("provenance")
        return found if isinstance(found, dict) else {}


def read_training(folder: Path, config: dict[str, Any]) -> Training:
    """Read what `eqvae train` has left so far."""
    card = read_card(folder)
    found = {path.stem.removeprefix("step_"): path for path in (folder / STAGES).glob("step_*.png")}
    sheets = {int(step): path for step, path in found.items() if step.isdigit()}
    return Training(
        folder=folder,
        name=f"{config.get('recipe', 'generator')} on {autoencoder_name(config, card)}",
        config=config,
        environment=read_environment(folder),
        journal=read_journal(folder),
        metrics=read_json(folder / METRICS) if (folder / METRICS).exists() else {},
        card=card,
        sheets=dict(sorted(sheets.items())),
    )


def read_sample_set(folder: Path, config: dict[str, Any]) -> SampleSet:
    """Read what `eqvae sample` left."""
    for name in (METRICS, SHEET):
        if not (folder / name).exists():
            raise UserError(f"The samples in '{folder}' have no {name}", "Let 'eqvae sample' finish first")
    return SampleSet(
        folder=folder,
        name=folder.name,
        config=config,
        environment=read_environment(folder),
        metrics=read_json(folder / METRICS),
    )


def read_score(folder: Path, config: dict[str, Any]) -> Score:
    """Read what `eqvae score` left."""
    if not (folder / METRICS).exists():
        raise UserError(f"The score in '{folder}' has no {METRICS}", "Let 'eqvae score' finish first")
    return Score(
        folder=folder,
        name=_samples_name(Path(str(config.get("samples", "")))) or folder.name,
        config=config,
        environment=read_environment(folder),
        journal=read_journal(folder),
        metrics=read_json(folder / METRICS),
    )


def data_name(source: Any) -> str:
    """Shorten what was given as a reference: the last part of a path, which may be gone by now."""
    return str(source) if str(source).startswith("hf:") else Path(str(source)).name


def _samples_name(path: Path) -> str:
    """The folder's, for what `eqvae sample` wrote; an archive's own for one from elsewhere."""
    if path.suffix != ".npz":
        return path.name
    return path.parent.name if path.stem == "samples" and path.parent.name else path.stem
