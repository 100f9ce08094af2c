"""Which autoencoders the paper compares: bases, and what its tables fine-tune them with."""

from dataclasses import dataclass, replace
from typing import Literal

from eqvae.paper.planned import PlannedRun
from eqvae.paper.setting import Base, Setting
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runtime.run_folder import change_flat

Transforms = Literal["paper", "rotation", "scale", "anisotropic"]


@dataclass(frozen=True, kw_only=True)
class PlannedAutoencoder:
    """An autoencoder to measure and to train generators on."""

    name: str
    """In names of runs, e.g. `tiny-kl-64+eq`."""

    location: str
    """What `load_autoencoder` takes."""

    base: Base
    """What it was fine-tuned from, or is."""

    run: PlannedRun | None
    """The fine-tuning that makes it; None for a base."""

    @property
    def needs(self) -> tuple[PlannedRun, ...]:
        """What must be finished before it can be loaded."""
        return () if self.run is None else (self.run,)


def untouched(setting: Setting, base: str) -> PlannedAutoencoder:
    """Take a base as it is."""
    found = setting.base(base)
    return PlannedAutoencoder(name=found.name, location=found.location, base=found, run=None)


def equivariant(
    setting: Setting,
    base: str,
    *,
    transforms: Transforms = "paper",
    probability: float | None = None,
    epochs: int | None = None,
) -> PlannedAutoencoder:
    """Fine-tune with EQ-VAE (Equations 5 and 7)."""
    template = _template(setting, base)
    name = "+eq" if transforms == "paper" else f"+{transforms}"
    if probability is not None and probability != template.training.transform.equivariance_probability:
        template = change_flat(template, equivariance_probability=probability)
        name += f"-p{probability:g}"
    if epochs is not None and epochs != setting.epochs:
        name += f"-{epochs}-epochs"
    return _tuned(setting, base, name, change_flat(template, transforms=transforms), epochs=epochs)


def more_training(setting: Setting, base: str) -> PlannedAutoencoder:
    """Fine-tune as long with the standard objective alone, Equation 1 (Table 6)."""
    template = change_flat(_template(setting, base), transforms="plain", equivariance_probability=0.0)
    return _tuned(setting, base, "+plain", template)


def explicit(setting: Setting, base: str, *, stop_gradient: bool) -> PlannedAutoencoder:
    """Fine-tune with the explicit regularization, Equation 4 beside Equation 1 (Table 7)."""
    objective: Literal["explicit", "explicit-stop-gradient"] = "explicit-stop-gradient" if stop_gradient else "explicit"
    template = change_flat(_template(setting, base), objective=objective, explicit_weight=0.1)
    return _tuned(setting, base, f"+{objective}", template)


def evaluation(setting: Setting, autoencoder: PlannedAutoencoder) -> PlannedRun:
    """Measure equivariance, reconstruction and latents (Sections B, C.2, C.3)."""
    name = f"evaluations/{autoencoder.name}"
    config = replace(setting.evaluation, autoencoder=autoencoder.location, out=setting.root / name)
    return PlannedRun(name=name, config=config, needs=autoencoder.needs, architecture=autoencoder.base.architecture)


def latents(setting: Setting, autoencoder: PlannedAutoencoder) -> PlannedRun:
    """Encode the generators' images, once for all of them."""
    name = f"latents/{autoencoder.name}"
    config = replace(setting.encoding, autoencoder=autoencoder.location, out=setting.root / name)
    return PlannedRun(name=name, config=config, needs=autoencoder.needs, architecture=autoencoder.base.architecture)


def _template(setting: Setting, base: str) -> FinetuneConfig:
    return setting.discrete_finetuning if setting.base(base).is_discrete else setting.finetuning


def _tuned(
    setting: Setting, base: str, suffix: str, template: FinetuneConfig, *, epochs: int | None = None
) -> PlannedAutoencoder:
    """Complete a fine-tuning run."""
    found = setting.base(base)
    name = f"autoencoders/{found.name}{suffix}"
    config = change_flat(
        template,
        autoencoder=found.location,
        out=setting.root / name,
        max_steps=(setting.epochs if epochs is None else epochs) * setting.steps_per_epoch,
    )
    run = PlannedRun(name=name, config=config, architecture=found.architecture)
    return PlannedAutoencoder(name=found.name + suffix, location=str(run.folder), base=found, run=run)
