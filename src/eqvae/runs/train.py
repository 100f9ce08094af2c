"""`eqvae train RECIPE --latents DIR --out DIR`: a generator learns the latents of a cache."""

import json
from collections.abc import Callable
from collections.abc import Generator as Draws
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from eqvae.artifacts.files import load_strictly
from eqvae.artifacts.names import CHECKPOINT, CONTACT_SHEETS, METRICS, contact_sheet_name
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import Generator, GeneratorCard, build_generator, read_generator
from eqvae.generators.families import Backbone, BackboneConfig, Recipe
from eqvae.generators.protocol import LatentSpecification, Objective
from eqvae.generators.repa import TEACHER_TOKENS
from eqvae.generators.transformer import TransformerConfig
from eqvae.images.image_sets import open_reference
from eqvae.latents.batches import training_batches
from eqvae.latents.cache import MEASURED, LatentBatch, LatentCache, check_autoencoder
from eqvae.latents.teaching import TeacherTokens, teach
from eqvae.metrics.frechet import FeatureMoments, frechet_distance
from eqvae.metrics.statistics import FeatureStatistics, compute_statistics, holds_statistics
from eqvae.networks.features import FeatureExtractor, load_features, metric_key
from eqvae.runs.train_config import FREE_TO_CHANGE, TrainConfig
from eqvae.runs.train_run import Run, transformer_flops
from eqvae.runtime.device import choose_device, place
from eqvae.runtime.journal import Journal, installed_version
from eqvae.runtime.processes import Processes, join_processes, stop_on_signals
from eqvae.runtime.run_folder import RunFolder, flat
from eqvae.runtime.seeds import generator_for
from eqvae.sampling.config import SamplerConfig
from eqvae.sampling.draw import Drawer, contact_sheet, sheet_indices
from eqvae.training.generator_step import TrainingBatch, build_state

_WEIGHTS = 2  # what a random stream is for

_WATCH_BATCH_SIZE = 50

_BYTES_PER_PARAMETER = 4 + 4 + 8 + 4
"""Weight, gradient, two moments of AdamW, moving average; all fp32."""

_MODELLED = {"moments": "latents", "tokens": "tokens"}


def command(config: TrainConfig) -> str | None:
    """Train, or write the plan of it."""
    if config.dry_run:
        return json.dumps(describe_plan(config), indent=2)
    figures = train(config)
    if figures is None:  # the first of several processes speaks for all
        return None
    distances = "".join(f", {name} {value:.3f}" for name, value in figures.items() if name.startswith(("fid", "fd_")))
    return (
        f"{figures['num_steps']} steps, {figures['training_images_per_sec']:.1f} images/s{distances}; "
        f"generator in '{config.out}'"
    )


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Train, or go on where an earlier call with the same configuration stopped or, with fewer steps, ended."""
    config = config.resolved()
    processes = join_processes(choose_device(config.device))
    plan = make_plan(config, processes)
    fingerprint = plan.cache.index.fingerprint
    folder = RunFolder.claim(config.out, "train")
    folder.check_same(config, FREE_TO_CHANGE)
    if folder.differs(latents_fingerprint=fingerprint):
        raise UserError(
            f"'{config.out}' holds a run on latents of another autoencoder than '{config.latents}' has now",
            "Give the same latents to resume it, or another --out",
        )
    done = folder.figures or {"num_steps": 0}
    if done["num_steps"] > config.max_steps:
        raise UserError(
            f"'{config.out}' has taken {done['num_steps']} steps, more than --max-steps {config.max_steps}",
            "Give as many or more, or another --out",
        )
    if done["num_steps"] == config.max_steps:
        return done if processes.is_first else None
    autoencoder = load_decoder(plan.cache, config.autoencoder, processes.device)
    reference = load_reference(config, plan.cache.index.image_size_px, processes)
    card = _card(plan)
    transformer = plan.transformer.build(generator=generator_for(config.seed, _WEIGHTS))
    if config.init is not None and not (config.out / CHECKPOINT).exists():
        begin_from(config.init, transformer, plan)
    state = build_state(transformer, plan.objective, config, processes.device)
    with (
        # Figures of a run that is made longer are not figures of this one.
        folder.hold(config, processes, seed=config.seed, anew=(METRICS,), latents_fingerprint=fingerprint),
        stop_on_signals() as stop,
    ):
        run = Run(
            config=config,
            processes=processes,
            state=state,
            objective=plan.objective,
            card=card,
            batches=_batches(plan, processes),
            watch=SampleWatch(
                config=config,
                generator=lambda: build_generator(card, state.average.weights(), source="the averaged weights"),
                autoencoder=autoencoder,
                reference=reference,
                processes=processes,
            ),
            journal=None,
            stop=stop,
        )
        run.resume()
        run.journal = Journal(config.out, keep_up_to_step=state.step) if processes.is_first else None
        figures = run.train()
    return figures if processes.is_first else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration asks for, resolved against its cache."""

    config: TrainConfig
    recipe: Recipe
    cache: LatentCache
    objective: Objective
    transformer: BackboneConfig
    teacher: TeacherTokens | None


def make_plan(config: TrainConfig, processes: Processes) -> Plan:
    """Open the cache and resolve the recipe against it."""
    recipe = config.find_recipe()
    cache = LatentCache.open(config.latents, normalization=config.dit.normalization if config.dit else MEASURED)
    if recipe.models != cache.index.kind:
        holds = _MODELLED[cache.index.kind]
        raise UserError(f"'{recipe}' models {_MODELLED[recipe.models]}; '{config.latents}' holds {holds}", recipe.mend)
    if config.batch_size % (processes.count * config.gradient_accumulation_steps):
        raise UserError(
            f"--batch-size {config.batch_size} can't be split over {processes.count} processes and "
            f"{config.gradient_accumulation_steps} equal parts",
            f"Choose a multiple of {processes.count * config.gradient_accumulation_steps}",
        )
    channels, height, width = cache.latent_shape
    latents = LatentSpecification(
        channels=cache.index.codebook_size or channels,
        height=height,
        width=width,
        num_classes=cache.index.num_classes or 0,
    )
    objective = recipe.objective(latents, label_dropout=config.label_dropout)
    transformer, teacher = recipe.transformer(latents), None
    if config.repa is not None:
        teacher = teach(config.repa, cache, transformer.grid, processes)
        transformer = replace(cast(TransformerConfig, transformer), teacher_channels=teacher.channels)
    return Plan(
        config=config, recipe=recipe, cache=cache, objective=objective, transformer=transformer, teacher=teacher
    )


def describe_plan(config: TrainConfig) -> dict[str, Any]:
    """Work out what a run would do and cost: `--dry-run`."""
    config = config.resolved()
    plan = make_plan(config, join_processes(choose_device(config.device)))
    with torch.device("meta"):
        num_parameters = plan.transformer.build().num_parameters()
    flops_per_step = 3 * transformer_flops(plan.transformer) * config.batch_size
    rows, columns = plan.transformer.grid
    latents = plan.transformer.latents
    return {
        "config": flat(config),
        "num_parameters": num_parameters,
        "latent_size": [plan.cache.index.latent_channels, latents.height, latents.width],
        "codebook_size": plan.cache.index.codebook_size,
        "num_tokens": rows * columns,
        "num_classes": latents.num_classes,
        "num_images": len(plan.cache),
        "epochs": config.max_steps * config.batch_size / len(plan.cache),
        "tflops_per_step": flops_per_step / 1e12,
        "tflops_total": flops_per_step * config.max_steps / 1e12,
        "state_gib": _BYTES_PER_PARAMETER * num_parameters / 2**30,
    }


def begin_from(run: Path, transformer: Backbone, plan: Plan) -> None:
    """Replace first weights by the averaged ones of another run: `--init`."""
    generator = read_generator(run)
    theirs, own = generator.card.transformer.latents, plan.transformer.latents
    differences = (
        ("a", f"'{generator.card.recipe}'", f"'{plan.recipe}'"),
        ("of", f"{theirs.num_classes} classes", f"{own.num_classes} classes"),
        ("of latents of", " x ".join(map(str, theirs.shape)), " x ".join(map(str, own.shape))),
        ("trained on", _describe_path(generator.card.interpolant), _describe_path(plan.recipe.interpolant)),
    )
    for what, there, here in differences:
        if there != here:
            raise UserError(f"--init '{run}' is {what} {there}, this run {what} {here}", "Name a run that is alike")
    state = transformer.state_dict()
    weights = generator.transformer.state_dict()
    for name, first in state.items():  # another teacher's tokens may be of another width: its projector begins anew
        if name.startswith("projectors.") and (name not in weights or weights[name].shape != first.shape):
            weights[name] = first
    load_strictly(transformer, weights, source=str(run), mend="Choose the same options for the transformer")


def _describe_path(interpolant: Any) -> str:
    return "no path" if interpolant is None else f"path {interpolant.path} and {interpolant.prediction}"


def load_decoder(cache: LatentCache, name: str | None, device: torch.device) -> Autoencoder:
    """Load the autoencoder that made a cache."""
    name = name or cache.index.autoencoder
    autoencoder = load_autoencoder(name)
    check_autoencoder(cache, fingerprint=autoencoder.fingerprint(), name=name)
    return place(autoencoder, device)


def _batches(plan: Plan, processes: Processes) -> Callable[[int, int], Draws[TrainingBatch, None, None]]:
    """Bind the cache's reader to the run's processes; a teacher's tokens join the draws."""
    config = plan.config

    def draws(batch: LatentBatch) -> dict[str, Tensor]:
        return {} if plan.teacher is None else {TEACHER_TOKENS: plan.teacher.tokens(batch.indices, batch.mirrored)}

    def batches(first_step: int, num_steps: int) -> Draws[TrainingBatch, None, None]:
        for batch in training_batches(
            plan.cache,
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=first_step,
            num_steps=num_steps,
            flip=config.flip,
            sample=config.dit is not None and config.dit.posterior == "sample",
            rank=processes.rank,
            count=processes.count,
        ):
            labels = torch.zeros(len(batch.latents), dtype=torch.int64) if batch.labels is None else batch.labels
            yield TrainingBatch(latents=batch.latents, labels=labels, draws=draws(batch))

    return batches


def _card(plan: Plan) -> GeneratorCard:
    index, normalization = plan.cache.index, plan.cache.normalization
    return GeneratorCard(
        family=plan.recipe.family,
        recipe=str(plan.recipe),
        transformer=plan.transformer,
        interpolant=plan.recipe.interpolant,
        shift=tuple(normalization.shift.tolist()),
        scale=tuple(normalization.scale.tolist()),
        autoencoder=plan.config.autoencoder or index.autoencoder,
        autoencoder_fingerprint=index.fingerprint,
        image_size_px=index.image_size_px,
        class_names=index.class_names,
        num_steps=0,
        eqvae_version=installed_version("eqvae") or "unknown",
        schedule=plan.config.maskgit.schedule if plan.config.maskgit else None,
    )


# What is looked at during the run ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are measured against, and by which features."""

    extractor: FeatureExtractor

    statistics: FeatureStatistics


@dataclass(frozen=True, kw_only=True)
class SampleWatch:
    """Draws the same images (seed and indices) after each stretch of training; every process draws its part."""

    config: TrainConfig

    generator: Callable[[], Generator]
    """The averaged weights as they are now."""

    autoencoder: Autoencoder

    reference: Reference | None

    processes: Processes

    def __call__(self, step: int) -> dict[str, float | int]:
        """Draw pictures and measure."""
        generator, config, device = self.generator(), self.config, self.processes.device
        generator.transformer.to(device)
        drawer = Drawer(
            generator=generator,
            autoencoder=self.autoencoder,
            config=SamplerConfig(num_steps=config.watch_steps, seed=config.seed, precision=config.precision),
            device=device,
        )
        if self.processes.is_first:
            shown = sheet_indices(config.num_watch_samples, drawer.num_classes)
            parts = [
                drawer.images(shown[start : start + _WATCH_BATCH_SIZE])
                for start in range(0, len(shown), _WATCH_BATCH_SIZE)
            ]
            contact_sheet(torch.cat(parts), config.out / CONTACT_SHEETS / contact_sheet_name(step))
        if self.reference is None:
            return {}
        moments, own = FeatureMoments(), range(config.num_watch_samples)[self.processes.rank :: self.processes.count]
        for start in range(0, len(own), _WATCH_BATCH_SIZE):
            images = drawer.images(own[start : start + _WATCH_BATCH_SIZE])
            moments.add(self.reference.extractor.extract(images).pooled)
        moments = moments.summed_over(self.processes)
        statistics = self.reference.statistics
        distance = frechet_distance(
            moments.mean.cpu(), moments.covariance.cpu(), statistics.mean.cpu(), statistics.covariance.cpu()
        )
        return {metric_key(self.reference.extractor.name): distance, "num_samples": config.num_watch_samples}


def load_reference(config: TrainConfig, image_size_px: int, processes: Processes) -> Reference | None:
    """Compute or read the statistics that samples are measured against during the run."""
    if config.reference is None:
        return None
    extractor = place(load_features(config.features), processes.device)
    path = Path(config.reference).expanduser()
    if holds_statistics(path):
        statistics = FeatureStatistics.load(path)
        if statistics.provenance.features != extractor.name:
            raise UserError(
                f"--reference '{path}' holds statistics of {statistics.provenance.features}",
                f"Use --features {statistics.provenance.features}, or write others with 'eqvae score --save-reference'",
            )
        return Reference(extractor=extractor, statistics=statistics)
    images = open_reference(config.reference, image_size_px=image_size_px)
    indices = range(len(images))
    statistics = compute_statistics(extractor, images, indices=indices, device=processes.device, processes=processes)
    return Reference(extractor=extractor, statistics=statistics)
