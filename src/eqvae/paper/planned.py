"""A planned run: a stage's complete configuration, and the runs whose folders it reads."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eqvae.artifacts import CONFIG, METRICS, read_json
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.latents.normalization import FIXED
from eqvae.paper.reference import ReferenceConfig, write_reference
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runs.evaluate import EvaluateConfig, evaluate
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runs.sample import SampleConfig, sample
from eqvae.runs.score import ScoreConfig, score
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import change_flat, flat

Config = FinetuneConfig | EvaluateConfig | ReferenceConfig | EncodeConfig | TrainConfig | SampleConfig | ScoreConfig

Architecture = str | Autoencoder
"""A preset's name, or an autoencoder of that architecture."""

COMMANDS: dict[type, str] = {
    FinetuneConfig: "finetune",
    EvaluateConfig: "evaluate",
    ReferenceConfig: "reference",
    EncodeConfig: "encode",
    TrainConfig: "train",
    SampleConfig: "sample",
    ScoreConfig: "score",
}
"""What each kind of run is called."""

FOR_ONE_PROCESS = (FinetuneConfig,)
"""Stages that one process does alone, however many were launched."""

CHANGES_NO_FIGURE = frozenset(
    {"out", "device", "num_workers", "log_every", "checkpoint_every", "validate_every", "tensorboard", "compile",
     "dry_run", "gradient_checkpointing", "cache_teacher"}
)  # fmt: skip
"""Fields in which a finished run may differ from the plan."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a plan."""

    name: str
    """Its folder below the plan's root, e.g. `generators/dit-ti-2/tiny-kl-64+eq/seed-0`."""

    config: Config
    """Complete; `out` is the folder."""

    needs: tuple["PlannedRun", ...] = ()
    """The runs whose folders it reads."""

    scaled_as: "PlannedRun | None" = None
    """A latent cache, one of `needs`: latents are multiplied by the factor that gives *its* latents deviation 1, which
    is known once it is there. None: `config.normalization` holds."""

    architecture: Architecture | None = field(default=None, compare=False)
    """What its autoencoder is built like, for estimates of cost; None where it has none."""

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.config.out

    @property
    def command(self) -> str:
        """What kind of run it is."""
        return COMMANDS[type(self.config)]

    @property
    def is_finished(self) -> bool:
        """Whether all is there: every stage writes `metrics.json` last."""
        return (self.folder / METRICS).is_file()

    @property
    def has_begun(self) -> bool:
        """Whether something is there."""
        return (self.folder / CONFIG).is_file()

    @property
    def is_ready(self) -> bool:
        """Whether all that it needs is there."""
        return all(need.is_finished for need in self.needs)

    def resolved(self) -> Config:
        """Fill in what is only known once `needs` are finished."""
        if self.scaled_as is None or not isinstance(self.config, TrainConfig):
            return self.config
        return change_flat(self.config, normalization=f"{FIXED}{unit_factor(self.scaled_as.folder):.6g}")

    def figures(self) -> dict[str, Any]:
        """Read what it measured."""
        return read_json(self.folder / METRICS) if self.is_finished else {}

    def check_saved(self) -> None:
        """Refuse a folder whose run is another one than the plan's."""
        if not self.has_begun:
            return
        saved = read_json(self.folder / CONFIG)
        planned = self.resolved() if self.is_ready else self.config
        if saved.get("command") != self.command:
            raise UserError(f"'{self.folder}' holds no 'eqvae {self.command}' run", "Choose another --out")
        late = {"normalization"} if self.scaled_as is not None and not self.is_ready else set()
        for name, now in flat(planned).items():
            then = saved.get(name)
            # None leaves the value to the stage, which has written down what it chose.
            if now is None or name in CHANGES_NO_FIGURE | late or name not in saved or now == then:
                continue
            raise UserError(
                f"'{self.folder}' holds a run with --{name.replace('_', '-')} {then}, and now it is {now}",
                "Choose another --out, or remove that folder to have it made again",
            )


def unit_factor(cache: Path) -> float:
    """Compute the factor that gives a cache's latents standard deviation 1, all channels together (LDM's 0.18215)."""
    std = read_json(cache / METRICS).get("latent_std")
    if not std:
        raise UserError(f"'{cache}' holds no latents with a standard deviation", "Use --normalization measured")
    return 1.0 / float(std)


def perform(run: PlannedRun) -> None:
    """Do a run, or go on with it."""
    match run.resolved():
        case FinetuneConfig() as config:
            finetune(config, load_autoencoder(config.autoencoder))
        case EvaluateConfig() as config:
            evaluate(config, load_autoencoder(config.autoencoder))
        case ReferenceConfig() as config:
            write_reference(config)
        case EncodeConfig() as config:
            encode(config, load_autoencoder(config.autoencoder))
        case TrainConfig() as config:
            train(config)
        case SampleConfig() as config:
            sample(config)
        case ScoreConfig() as config:
            score(config)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs in an order in which each comes after what it needs, each once."""

    runs: tuple[PlannedRun, ...]

    @classmethod
    def of(cls, wanted: Iterable[PlannedRun]) -> "Plan":
        """Gather runs and all that they need."""
        known: dict[str, PlannedRun] = {}

        def add(run: PlannedRun) -> None:
            former = known.get(run.name)
            if former is None:
                for need in run.needs:
                    add(need)
                known[run.name] = run
            elif former is not run and former != run:
                raise UserError(
                    f"the plan has two different runs called '{run.name}'",
                    "Give autoencoders names of their own: --autoencoder NAME=PATH",
                )

        for run in wanted:
            add(run)
        return cls(runs=tuple(known.values()))

    @property
    def unfinished(self) -> tuple[PlannedRun, ...]:
        """What is left to do."""
        return tuple(run for run in self.runs if not run.is_finished)

    def check_saved(self) -> None:
        """Refuse folders whose runs are other ones than the plan's."""
        for run in self.runs:
            run.check_saved()
