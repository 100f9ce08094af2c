"""What is planned: runs with complete configurations, what they need, and the autoencoders that come of some."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from eqvae.artifacts.files import read_json, write_json
from eqvae.artifacts.names import AUTOENCODER, CONFIG, METRICS, MODEL_CARD, STATISTICS
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.presets import PRESETS, UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError
from eqvae.evidence.curves import read_if_there
from eqvae.images.image_sets import open_reference
from eqvae.latents.cache import FIXED
from eqvae.methods import normal_form
from eqvae.networks.features import INCEPTION, load_features
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.sample import SampleConfig
from eqvae.runs.score import ScoreConfig, read_reference
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.processes import join_processes
from eqvae.runtime.run_folder import RunFolder, change_flat, flat, has_result


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Compute the feature statistics of a reference."""

    reference: str
    """An ADM reference batch (.npz) or any DATA."""

    out: Path
    """Output folder."""

    image_size: int
    """Side to which DATA is cropped, in px: the samples'."""

    features: str = INCEPTION
    """`inception` (FID), `efficientnet-lite0` (offline) or a model of timm."""

    precision: Precision = "fp32"
    """Of the features' convolutions, which must be that of the samples'."""

    batch_size: int = 64
    """Images at a time; changes no figure by more than rounding."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    num_workers: int = 1
    """Processes that decode images ahead."""


def write_reference(config: ReferenceConfig) -> dict[str, Any]:
    """Compute and write the statistics that all samples of a plan are measured against, an ADM batch's own first."""
    folder = RunFolder.claim(config.out, "reference")
    processes = join_processes(choose_device(config.device))
    images = open_reference(config.reference, image_size_px=config.image_size)
    images.announce("REFERENCE", processes)
    extractor = place(load_features(config.features), processes.device)
    statistics = read_reference(images, range(len(images)), config, extractor, processes)
    figures = {"num_images": len(images)}
    with folder.hold(config, processes, seed=None):
        if processes.is_first:
            statistics.save(config.out / STATISTICS)
            write_json(config.out / METRICS, figures)
    return figures


# EqualizeConfig is a FinetuneConfig.
Config = FinetuneConfig | EvaluateConfig | ReferenceConfig | EncodeConfig | TrainConfig | SampleConfig | ScoreConfig

_CHANGES_NO_FIGURE = frozenset(
    {"out", "device", "num_workers", "log_every", "checkpoint_every", "keep_every", "keep_last", "validate_every",
     "tensorboard", "compile", "dry_run", "gradient_checkpointing", "cache_teacher", "shard"}
)  # fmt: skip
"""Fields in which a finished run may differ from the plan."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of a plan: a complete configuration, and the runs whose folders it reads."""

    command: str
    """What does it: a command of `eqvae`, or `reference`."""

    name: str
    """Its folder below the plan's root, e.g. `generators/dit-ti-2/tiny-kl+eq/seed-0`."""

    config: Config
    """Complete; `out` is the folder."""

    needs: tuple["PlannedRun", ...] = ()
    """The runs whose folders it reads."""

    scaled_as: "PlannedRun | None" = None
    """A latent cache, one of `needs`: latents are multiplied by the factor that gives *its* latents deviation 1, which
    is known once it is there. None: `config.normalization` holds."""

    deviation_of: "PlannedRun | None" = None
    """Another cache of `needs`: the factor, of `scaled_as` or of `config`, becomes one that gives these latents the
    deviation that *its* latents have with it."""

    spectrum_of: "PlannedRun | None" = None
    """Of a fine-tuning, an evaluation of `needs`: its excess of high frequencies is what `lowpass` leaves alone."""

    architecture: str | Autoencoder | None = field(default=None, compare=False)
    """A preset's name, or an autoencoder built like its own, for estimates of cost; None where it has none."""

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.config.out

    @property
    def is_finished(self) -> bool:
        """Whether all is there: every command writes `metrics.json` last. A longer training goes on with a shorter."""
        path = self.folder / METRICS
        if not isinstance(self.config, TrainConfig):
            return path.is_file()
        return self.num_steps_done >= self.config.max_steps

    @property
    def num_steps_done(self) -> int:
        """Of a training that has finished, at whatever length; 0 of others."""
        path, wanted = self.folder / METRICS, flat(self.config).get("max_steps", 0)
        try:
            return int(_read_figures(path, path.stat().st_mtime_ns).get("num_steps", wanted))
        except FileNotFoundError:
            return 0
        except UserError:
            if path.exists():
                raise
            return 0  # another taker has just begun to lengthen it

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
        if self.spectrum_of is not None:
            excess_db = _measured(self.spectrum_of, "spectrum_excess_db")
            method = normal_form(f"{flat(self.config)['method']} + lowpass(excess_db={excess_db:.3f})")
            return change_flat(self.config, method=method)
        if self.scaled_as is None and self.deviation_of is None:
            return self.config
        if self.scaled_as is None:  # the base has a published factor
            factor = float(str(flat(self.config)["normalization"]).removeprefix(FIXED))
        else:
            factor = 1.0 / _measured(self.scaled_as, "latent_std")  # as LDM's 0.18215
        if self.deviation_of is not None:
            (own,) = (need for need in self.needs if str(need.folder) == str(flat(self.config)["latents"]))
            factor *= _measured(self.deviation_of, "latent_std") / _measured(own, "latent_std")
        return change_flat(self.config, normalization=f"{FIXED}{factor:.6g}")

    def figures(self) -> dict[str, Any]:
        """Read what it measured."""
        path = self.folder / METRICS
        return _read_figures(path, path.stat().st_mtime_ns) if self.is_finished else {}

    def check_saved(self) -> None:
        """Refuse a folder whose run is another one than the plan's."""
        if not self.has_begun or not has_result(self.folder):
            return
        saved = read_json(self.folder / CONFIG)
        if saved.get("command") != self.command:
            raise UserError(f"'{self.folder}' holds no 'eqvae {self.command}' run", "Choose another --out")
        former = self._as_if_here(saved) if self.is_finished else saved  # what is left would not go on here
        later = {"normalization"} if self.scaled_as is not None or self.deviation_of is not None else set()
        later |= {"method"} if self.spectrum_of is not None else set()
        free = _CHANGES_NO_FIGURE | (set() if self.is_ready else later)
        for name, now in flat(self.resolved() if self.is_ready else self.config).items():
            # None leaves the value to the command, which has written down what it chose.
            if now is None or name in free or name not in saved or now == former[name]:
                continue
            mend = "Choose another --out, or remove that folder to have it made again"
            if name == "max_steps" and self.command == "train":
                if saved[name] < now:
                    continue  # it goes on
                mend = "Ask for as many steps or more, or choose another --out"
            raise UserError(
                f"'{self.folder}' holds a run with --{name.replace('_', '-')} {saved[name]}, and now it is {now}", mend
            )
        for name, (what, content) in self._origins().items():
            if name in saved and saved[name] != content:
                raise UserError(
                    f"'{self.folder}' holds a run that was made with {what} as it was then, and it has changed since",
                    "Put back what it was, or choose another --out",
                )

    def _as_if_here(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Name the plan's folders as they are named now: its root may have been moved, or be spelt otherwise."""
        before, now = (str(out).removesuffix(self.name) for out in (saved.get("out", ""), self.folder))
        return {
            name: now + value.removeprefix(before) if before and isinstance(value, str) and value.startswith(before)
            else value
            for name, value in saved.items()
        }  # fmt: skip

    def _origins(self) -> dict[str, tuple[str, object]]:
        """What a run depends on beside its flags, by the keys of `config.json`: in words, and its digest now."""
        config: Any = self.config
        found: dict[str, tuple[str, object]] = {}
        if self.command == "finetune" and (files := config.training.mixture().files()):
            found["method_files"] = (", ".join(map(repr, files)), files)
        if (key := _DIGESTS.get(self.command)) is None:
            return found
        if any(need.command in ("finetune", "equalize") for need in self.needs):
            card = read_if_there(Path(config.autoencoder) / AUTOENCODER / MODEL_CARD) if self.is_ready else None
            digest = card and card["fingerprint"]
        else:  # nothing is asked of a preset: its weights are what they are
            digest = _fingerprint(self.architecture) if isinstance(self.architecture, Autoencoder) else None
        return found | ({key: (f"'{config.autoencoder}'", digest)} if digest else {})


_DIGESTS = {"finetune": "base_fingerprint", "evaluate": "fingerprint", "encode": "fingerprint"}
"""Which key of `config.json` says what weights an autoencoder had."""


@lru_cache(maxsize=64)
def _fingerprint(autoencoder: Autoencoder) -> str:
    """Digest a base's weights once for all runs that begin with it."""
    return autoencoder.fingerprint()


@lru_cache(maxsize=4096)
def _read_figures(path: Path, written_ns: int) -> dict[str, Any]:
    """Read once what many cells of a table ask for, after each run again."""
    return read_json(path)


def _measured(run: PlannedRun, key: str) -> float:
    """Read a figure that another run's configuration depends on."""
    value = read_json(run.folder / METRICS).get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or (key == "latent_std" and value <= 0):
        raise UserError(
            f"'{run.folder}' holds no usable '{key}', which other runs depend on",
            "Remove that folder to have it measured again, or choose another --out",
        )
    return float(value)


@dataclass(frozen=True, kw_only=True)
class PlannedAutoencoder:
    """An autoencoder to measure and to train generators on: a base, or what becomes of one."""

    name: str
    """In names of runs and rows of tables, e.g. `tiny-kl+eq`."""

    location: str
    """What `load_autoencoder` takes."""

    base: str
    """Name of what it is fine-tuned from; a base's own."""

    stride: int
    """Pixels per latent cell."""

    is_discrete: bool
    """Whether it has a codebook."""

    architecture: str | Autoencoder = field(compare=False)
    """A preset's name, or the base itself: for estimates of cost."""

    run: PlannedRun | None = None
    """The fine-tuning that makes it; None for a base."""

    twins: tuple["PlannedAutoencoder", ...] = ()
    """The same fine-tuning with other seeds."""

    @property
    def all_seeds(self) -> tuple["PlannedAutoencoder", ...]:
        """It and its twins."""
        return (self, *self.twins)

    @property
    def needs(self) -> tuple[PlannedRun, ...]:
        """What must be finished before it can be loaded."""
        return () if self.run is None else (self.run,)


def describe_base(name: str, location: str) -> PlannedAutoencoder:
    """Look at an autoencoder; the weights of presets are left alone."""
    known = location.removeprefix(UNTRAINED)
    architecture: str | Autoencoder = known
    if known in PRESETS:
        is_discrete, stride = PRESETS[known].architecture.class_name == "VQModel", PRESETS[known].stride
    else:
        architecture = load_autoencoder(location)
        is_discrete, stride = isinstance(architecture, DiscreteAutoencoder), architecture.stride
    return PlannedAutoencoder(
        name=name, location=location, base=name, stride=stride, is_discrete=is_discrete, architecture=architecture
    )


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
