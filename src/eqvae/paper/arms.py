"""What the paper's tables compare: autoencoders, as they are or fine-tuned, and generators of their latents."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from eqvae.artifacts.names import STATISTICS
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.families import PATCH_SIZES
from eqvae.images.sizes import square_px
from eqvae.methods import parse_method
from eqvae.methods.transform_config import TransformConfig
from eqvae.networks.features import Measure, metric_key
from eqvae.paper.equalize import EqualizeConfig
from eqvae.paper.plan import PlannedAutoencoder, PlannedRun
from eqvae.paper.setting import Family, Setting, Size
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.sample import SampleConfig
from eqvae.runtime.run_folder import change_flat, flat

CURVE = "curve"
"""In names of runs: a generator whose learning curve may be lengthened."""

Transforms = Literal["paper", "rotation", "scale", "anisotropic"]


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


def low_passed(setting: Setting, base: str) -> PlannedAutoencoder:
    """Fine-tune by Equation 1 and a term that lets latents have the high frequencies of EQ-VAE's, twin by twin."""
    plain, ours = more_training(setting, base), equivariant(setting, base)

    def changed(autoencoder: PlannedAutoencoder, like: PlannedAutoencoder) -> PlannedAutoencoder:
        run, measured = autoencoder.run, evaluation(setting, like)
        name = autoencoder.name.replace("+plain", "+lowpass")
        if run is None:
            raise UserError(f"'{autoencoder.name}' was given, and '{name}' repeats its fine-tuning", "Leave it out")
        folder = setting.root / "autoencoders" / name
        run = replace(
            run, name=f"autoencoders/{name}", config=change_flat(run.config, out=folder),
            needs=(measured,), spectrum_of=measured,
        )  # fmt: skip
        return replace(autoencoder, name=name, location=str(folder), run=run, twins=())

    first, *others = map(changed, plain.all_seeds, ours.all_seeds)
    return replace(first, twins=tuple(others))


def _template(setting: Setting, base: str) -> FinetuneConfig:
    return setting.discrete_finetuning if setting.base(base).is_discrete else setting.finetuning


def _tuned(
    setting: Setting,
    base: str,
    suffix: str,
    template: FinetuneConfig,
    *,
    epochs: int | None = None,
    max_steps: int | None = None,
) -> PlannedAutoencoder:
    """Plan the fine-tuning with each seed, or take what the user made; the first's folder has the recipe's own name."""
    found = setting.base(base)
    max_steps = max_steps or (setting.epochs if epochs is None else epochs) * setting.steps_per_epoch
    first, *others = setting.autoencoder_seeds

    def tuned(seed: int, mark: str = "") -> PlannedAutoencoder:
        name = found.name + suffix + mark
        if (given := setting.bases.get(name)) is not None:
            return replace(given, base=found.name)
        run = _planned(
            setting, "finetune", f"autoencoders/{name}", template,
            autoencoder=found.location, max_steps=max_steps, seed=seed, architecture=found.architecture,
        )  # fmt: skip
        return replace(found, name=name, location=str(run.folder), run=run)

    return replace(tuned(first), twins=tuple(tuned(seed, f"-seed-{seed}") for seed in others))


def by_method(setting: Setting, base: str, method: str) -> PlannedAutoencoder:
    """Fine-tune with a method or a mixture as `--method` has it, all else as the scale's recipe."""
    template = _with_method(_template(setting, base), method)
    parts = [part.method.name.rpartition(":")[2].lower() for part in parse_method(method)]
    digest = hashlib.sha256(method_text(template).encode()).hexdigest()[:8]
    return _tuned(setting, base, f"+{'+'.join(parts)}-{digest}", template)


def method_text(config: FinetuneConfig) -> str:
    """The mixture with all its parameters: two texts of one meaning give the same."""
    return str(config.training.resolved().mixture())


def _with_method(template: FinetuneConfig, method: str) -> FinetuneConfig:
    """Replace the method; the scale's flags of tau go to those that draw one, unless the text says otherwise."""
    drawing = [part for part in parse_method(method) if isinstance(part.method, TransformConfig)]
    named = {name for part in drawing for name in part.named}
    given = template.training.transform.given() if drawing else {}
    flags = {name: None if name in named else given.get(name) for name in flat(TransformConfig())}
    return change_flat(
        template, **flags, method=method, objective="implicit", kl_weight=None, explicit_weight=None
    )  # fmt: skip


def varied(setting: Setting, base: str, mark: str, **changes: object) -> PlannedAutoencoder:
    """Fine-tune as the scale's recipe has it, but for some flags; `mark` names them."""
    template = change_flat(_template(setting, base), **changes)
    max_steps = changes.get("max_steps")
    return _tuned(setting, base, f"+eq-{mark}", template, max_steps=max_steps if isinstance(max_steps, int) else None)


def equalized(
    setting: Setting, autoencoder: PlannedAutoencoder, *, chunk_steps: int, max_chunks: int
) -> PlannedAutoencoder:
    """Let the decoders of a fine-tuned autoencoder and its twins go on until PSNR is the base's."""
    recipe = _template(setting, autoencoder.base)
    template = EqualizeConfig.after(recipe, chunk_steps=chunk_steps, max_chunks=max_chunks)

    def with_decoder(each: PlannedAutoencoder) -> PlannedAutoencoder:
        assert each.run is not None
        run = _planned(
            setting, "equalize", f"equalized/{each.name}", template, each.needs,
            autoencoder=each.location, architecture=each.architecture, seed=flat(each.run.config)["seed"],
        )  # fmt: skip
        return replace(each, name=f"{each.name}-equal", location=str(run.folder), run=run, twins=())

    first, *others = map(with_decoder, autoencoder.all_seeds)
    return replace(first, twins=tuple(others))


def evaluations(setting: Setting, autoencoder: PlannedAutoencoder) -> tuple[PlannedRun, ...]:
    """Measure an autoencoder and its twins."""
    return tuple(evaluation(setting, each) for each in autoencoder.all_seeds)


def evaluation(setting: Setting, autoencoder: PlannedAutoencoder) -> PlannedRun:
    """Measure equivariance, reconstruction and latents (Sections B, C.2, C.3)."""
    return _planned(
        setting, "evaluate", f"evaluations/{autoencoder.name}", setting.evaluation, autoencoder.needs,
        autoencoder=autoencoder.location, architecture=autoencoder.architecture,
    )  # fmt: skip


def latents(setting: Setting, autoencoder: PlannedAutoencoder) -> PlannedRun:
    """Encode the generators' images, once for all of them."""
    return _planned(
        setting, "encode", f"latents/{autoencoder.name}", setting.encoding, autoencoder.needs,
        autoencoder=autoencoder.location, architecture=autoencoder.architecture,
    )  # fmt: skip


def reference(setting: Setting) -> PlannedRun:
    """Compute the statistics that samples are measured against."""
    return _planned(setting, "reference", "reference", setting.reference)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A generator on one autoencoder's latents and on those of its twins, trained on each once for each seed."""

    setting: Setting

    family: Family

    size: Size
    """What the paper trained; MaskGIT has only one."""

    autoencoder: PlannedAutoencoder

    max_steps: int | None = None
    """None: the setting's."""

    deviation_of: PlannedAutoencoder | None = None
    """With `is_fixed`: latents have the deviation that this one's, or its twins', have with the base's factor."""

    is_fixed: bool = False
    """Latents times the factor that fits the base, as the paper did, and not by their own mean and deviation."""

    @property
    def recipe(self) -> str:
        """The generator that stands for the paper's: the patch size keeps the number of tokens."""
        setting = self.setting
        if self.family == "maskgit":
            return f"maskgit-{setting.sizes['maskgit']}"
        cell_px = self.autoencoder.stride * setting.tokens_per_side
        patch_size = max(square_px(setting.encoding.image_size) // cell_px, 1)
        if patch_size not in PATCH_SIZES:
            raise UserError(
                f"images of {setting.encoding.image_size} px need patches of {patch_size} for "
                f"{setting.tokens_per_side} x {setting.tokens_per_side} tokens of '{self.autoencoder.name}'",
                f"Choose an --image-size of {', '.join(str(cell_px * size) for size in PATCH_SIZES)}",
            )
        return f"{self.family}-{setting.sizes[self.size]}-{patch_size}"

    @property
    def title(self) -> str:
        """For example `dit-b-2 on sd-vae+eq`."""
        return f"{self.recipe} on {self.autoencoder.name}"

    @property
    def trained(self) -> tuple[PlannedRun, ...]:
        """The training runs by autoencoder, by seed."""
        return tuple(
            self._train(place, seed) for place in range(len(self.autoencoder.all_seeds)) for seed in self.setting.seeds
        )

    def scored(self, *, guided: bool) -> tuple[PlannedRun, ...]:
        """The scores of a sample set of each, by ADM's protocol or its twin with other features."""
        setting = self.setting
        plain = setting.sampling[self.family]
        config = setting.guided_sampling[self.family] if guided else plain
        suffix = "-guided" if config != plain else ""
        scores = []
        for seed, run in zip(setting.seeds * len(self.autoencoder.all_seeds), self.trained, strict=True):
            drawn = sample_set(setting, run, replace(config, seed=seed), suffix=suffix)
            name, statistics = "scores/" + drawn.name.removeprefix("samples/"), reference(setting)
            files: dict[str, Any] = {"samples": drawn.folder, "reference": str(statistics.folder / STATISTICS)}
            scores.append(_planned(setting, "score", name, setting.scoring, (drawn, statistics), **files))
        return tuple(scores)

    def _train(self, place: int, seed: int) -> PlannedRun:
        setting, autoencoder = self.setting, self.autoencoder.all_seeds[place]
        base, like = autoencoder.base, self.deviation_of
        template = setting.training_of(self.family, self.size)
        steps = template.max_steps if self.max_steps is None else self.max_steps
        parts = ["generators", self.recipe, autoencoder.name]
        parts += ["fixed"] if self.is_fixed else []
        parts += [f"as-{like.name}"] if like is not None else []
        if self.max_steps is not None and steps != setting.training[self.family].max_steps:
            parts.append(f"{steps}-steps")
        elif self.size == "xl" and self.family in setting.long_training:
            parts.append(CURVE)  # at any length: it may be lengthened
        needs = [latents(setting, autoencoder), reference(setting)]
        scaled_as, deviation_of = None, None
        if like is not None:
            deviation_of = latents(setting, like.all_seeds[place])
            needs.append(deviation_of)
        if self.is_fixed and base in setting.fixed_factors:
            template = change_flat(template, normalization=f"fixed:{setting.fixed_factors[base]:g}")
        elif self.is_fixed:
            scaled_as = latents(setting, setting.base(base))
            needs += [scaled_as] if scaled_as != needs[0] else []
        run = _planned(
            setting, "train", "/".join([*parts, f"seed-{seed}"]), template, needs,
            recipe=self.recipe, latents=needs[0].folder, max_steps=steps, seed=seed,
            reference=str(needs[1].folder / STATISTICS), architecture=autoencoder.architecture,
        )  # fmt: skip
        return replace(run, scaled_as=scaled_as, deviation_of=deviation_of)


def sample_set(setting: Setting, trained: PlannedRun, config: SampleConfig, *, suffix: str) -> PlannedRun:
    """Draw a sample set."""
    name = "samples/" + trained.name.removeprefix("generators/") + suffix
    if f"/{CURVE}/" in trained.name:
        name += f"-{flat(trained.config)['max_steps']}-steps"
    folder = str(trained.folder)
    return _planned(setting, "sample", name, config, (trained,), run=folder, architecture=trained.architecture)


def redrawn(arm: Arm, decoder: PlannedAutoencoder) -> tuple[PlannedRun, ...]:
    """The scores of what an arm's generators draw as they were measured, with decoders that were trained further."""
    setting, template = arm.setting, arm.setting.training[arm.family]
    config = setting.sampling[arm.family]
    if config.guidance_scale == 1.0:  # else their distances were sample sets'
        config = replace(
            config, num_samples=template.num_watch_samples, num_steps=template.watch_steps,
            sampler=template.watch_sampler,
        )  # fmt: skip
    decoders = [each for each in decoder.all_seeds for _ in setting.seeds]
    statistics, scores = reference(setting), []
    for own, run in zip(decoders, arm.trained, strict=True):
        seed = flat(run.config)["seed"]
        drawn = sample_set(setting, run, replace(config, seed=seed, autoencoder=own.location), suffix="-equal")
        drawn = replace(drawn, needs=(*drawn.needs, *own.needs))
        name, files = "scores/" + drawn.name.removeprefix("samples/"), str(statistics.folder / STATISTICS)
        needs: dict[str, Any] = {"samples": drawn.folder, "reference": files}
        scores.append(_planned(setting, "score", name, setting.scoring, (drawn, statistics), **needs))
    return tuple(scores)


def distance_key(setting: Setting, measure: Measure = "fid") -> str:
    """Name a distance as `metrics.json` and the journal do: `fid`, or `fd_...` for other features."""
    return metric_key(setting.reference.features, measure)


def _planned(
    setting: Setting,
    command: str,
    name: str,
    template: Any,
    needs: Sequence[PlannedRun] = (),
    *,
    architecture: str | Autoencoder | None = None,
    **filled_in: object,
) -> PlannedRun:
    """Complete a run's configuration."""
    config = change_flat(template, out=setting.root / name, **filled_in)
    return PlannedRun(command=command, name=name, config=config, needs=tuple(needs), architecture=architecture)
