"""`eqvae train`: a latent cache, its images and its decoder handed to a generator's training run."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eqvae.artifacts import CONFIG, METRICS, claim_output_folder, hold_output_folder, read_json, to_plain, write_json
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import BackboneConfig, build_backbone
from eqvae.generators.export import GeneratorCard, build_generator
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.maskgit import MaskgitRecipe
from eqvae.generators.presets import Recipe
from eqvae.generators.protocol import LatentSpecification, Objective
from eqvae.generators.repa import TEACHER_TOKENS
from eqvae.latents.batches import training_batches, training_token_batches
from eqvae.latents.cache import LatentBatch, LatentCache, TokenBatch, check_autoencoder
from eqvae.latents.teaching import TeacherTokens, teach
from eqvae.runs.train_config import FREE_TO_CHANGE, TrainConfig, find_recipe
from eqvae.runs.train_run import Run, transformer_flops
from eqvae.runs.watching import SampleWatch, load_reference
from eqvae.runtime.device import choose_device, place
from eqvae.runtime.journal import Journal, installed_version, write_environment
from eqvae.runtime.processes import Processes, join_processes
from eqvae.runtime.run_folder import check_same_run
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import stop_on_signals
from eqvae.training.generator_step import TrainingBatch, build_state

_WEIGHTS = 2  # what a random stream is for

_BYTES_PER_PARAMETER = 4 + 4 + 8 + 4
"""Weight, gradient, two moments of AdamW, moving average; all fp32."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration asks for, resolved against its cache."""

    config: TrainConfig
    recipe: Recipe | MaskgitRecipe
    cache: LatentCache
    latents: LatentSpecification
    interpolant: Interpolant | None
    objective: Objective
    transformer: BackboneConfig
    teacher: TeacherTokens | None


def train_generator(config: TrainConfig) -> dict[str, Any] | None:
    """Train, or go on where an earlier call with the same configuration stopped or, with fewer steps, ended."""
    config = config.resolved()
    processes = join_processes(choose_device(config.device))
    plan = make_plan(config, processes)
    identity = to_plain(config) | {"command": "train", "latents_fingerprint": plan.cache.index.fingerprint}
    saved = claim_output_folder(config.out, "train")
    if saved is not None:
        check_same_run(saved, config, FREE_TO_CHANGE)
        if saved.get("latents_fingerprint") != identity["latents_fingerprint"]:
            raise UserError(
                f"'{config.out}' holds a run on latents of another autoencoder than '{config.latents}' has now",
                "Give the same latents to resume it, or another --out",
            )
        done = read_json(config.out / METRICS) if (config.out / METRICS).exists() else {"num_steps": 0}
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
    transformer = build_backbone(plan.transformer, generator=generator_for(config.seed, _WEIGHTS))
    state = build_state(transformer, plan.objective, config, processes.device)
    processes.wait()
    if processes.is_first:
        config.out.mkdir(parents=True, exist_ok=True)
    with hold_output_folder(config.out, hold=processes.is_first), stop_on_signals() as stop:
        if processes.is_first:
            (config.out / METRICS).unlink(missing_ok=True)  # of a run that is made longer
            write_json(config.out / CONFIG, identity)
            write_environment(config.out, device=processes.device, seed=config.seed)
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


def make_plan(config: TrainConfig, processes: Processes) -> Plan:
    """Open the cache and resolve the recipe against it."""
    recipe = find_recipe(config.recipe)
    cache = LatentCache.open(config.latents, normalization=config.normalization)
    if isinstance(recipe, MaskgitRecipe) and cache.index.kind == "moments":
        mend = "Train a DiT or SiT on it, or encode with a discrete autoencoder"
        raise UserError(f"'{recipe}' models tokens; '{config.latents}' holds latents", mend)
    if isinstance(recipe, Recipe) and cache.index.kind == "tokens":
        mend = "Train a MaskGIT on it, or encode with a KL model"
        raise UserError(f"'{recipe}' models latents; '{config.latents}' holds tokens", mend)
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
    if isinstance(recipe, MaskgitRecipe):
        return Plan(
            config=config,
            recipe=recipe,
            cache=cache,
            latents=latents,
            interpolant=None,
            objective=recipe.objective(
                latents,
                schedule=config.schedule,
                label_dropout=config.label_dropout,
                label_smoothing=config.label_smoothing,
                loss_tokens=config.loss_tokens,
            ),
            transformer=recipe.transformer(latents),
            teacher=None,
        )
    interpolant = recipe.interpolant
    if interpolant is not None:
        interpolant = replace(interpolant, path=config.path, prediction=config.prediction)
    transformer = recipe.transformer(latents, qk_norm=config.qk_norm)
    objective = recipe.objective(
        latents.num_classes,
        label_dropout=config.label_dropout,
        interpolant=interpolant,
        weight=config.loss_weight,
        repa_depth=config.repa_depth,
        repa_weight=config.repa_weight,
    )
    teacher = None
    if recipe.family == "repa-sit":
        if config.repa_depth is not None and config.repa_depth > transformer.depth:
            raise UserError(f"--repa-depth is {config.repa_depth}", f"'{recipe}' has {transformer.depth} blocks")
        teacher = teach(config, cache, recipe, processes)
        transformer = replace(transformer, teacher_channels=teacher.channels)
    return Plan(
        config=config,
        recipe=recipe,
        cache=cache,
        latents=latents,
        interpolant=interpolant,
        objective=objective,
        transformer=transformer,
        teacher=teacher,
    )


def describe_plan(config: TrainConfig) -> dict[str, Any]:
    """Work out what a run would do and cost: `--dry-run`."""
    config = config.resolved()
    plan = make_plan(config, join_processes(choose_device(config.device)))
    with torch.device("meta"):
        num_parameters = build_backbone(plan.transformer).num_parameters()
    flops_per_step = 3 * transformer_flops(plan.transformer) * config.batch_size
    rows, columns = plan.transformer.grid
    return {
        "config": to_plain(config),
        "num_parameters": num_parameters,
        "latent_size": [plan.cache.index.latent_channels, plan.latents.height, plan.latents.width],
        "codebook_size": plan.cache.index.codebook_size,
        "num_tokens": rows * columns,
        "num_classes": plan.latents.num_classes,
        "num_images": len(plan.cache),
        "epochs": config.max_steps * config.batch_size / len(plan.cache),
        "tflops_per_step": flops_per_step / 1e12,
        "tflops_total": flops_per_step * config.max_steps / 1e12,
        "state_gib": _BYTES_PER_PARAMETER * num_parameters / 2**30,
    }


def load_decoder(cache: LatentCache, name: str | None, device: torch.device) -> Autoencoder:
    """Load the autoencoder that made a cache."""
    name = name or cache.index.autoencoder
    autoencoder = load_autoencoder(name)
    check_autoencoder(cache, fingerprint=autoencoder.fingerprint(), name=name)
    return place(autoencoder, device)


def _batches(plan: Plan, processes: Processes) -> Callable[[int, int], Generator[TrainingBatch, None, None]]:
    """Bind the cache's reader to the run's processes; a teacher's tokens join the draws."""
    config = plan.config
    read: Callable[..., Iterator[LatentBatch | TokenBatch]] = training_token_batches
    if plan.cache.index.kind == "moments":
        read = partial(training_batches, sample=config.posterior == "sample")

    def draws(batch: LatentBatch | TokenBatch) -> dict[str, Tensor]:
        return {} if plan.teacher is None else {TEACHER_TOKENS: plan.teacher.tokens(batch.indices, batch.mirrored)}

    def batches(first_step: int, num_steps: int) -> Generator[TrainingBatch, None, None]:
        for batch in read(
            plan.cache,
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=first_step,
            num_steps=num_steps,
            flip=config.flip,
            rank=processes.rank,
            count=processes.count,
        ):
            latents = batch.tokens if isinstance(batch, TokenBatch) else batch.latents
            labels = torch.zeros(len(latents), dtype=torch.int64) if batch.labels is None else batch.labels
            yield TrainingBatch(latents=latents, labels=labels, draws=draws(batch))

    return batches


def _card(plan: Plan) -> GeneratorCard:
    index, normalization = plan.cache.index, plan.cache.normalization
    return GeneratorCard(
        recipe=str(plan.recipe),
        transformer=plan.transformer,
        interpolant=plan.interpolant,
        shift=tuple(normalization.shift.tolist()),
        scale=tuple(normalization.scale.tolist()),
        autoencoder=plan.config.autoencoder or index.autoencoder,
        autoencoder_fingerprint=index.fingerprint,
        image_size_px=index.image_size_px,
        class_names=index.class_names,
        num_steps=0,
        eqvae_version=installed_version("eqvae") or "unknown",
        schedule=plan.config.schedule if index.kind == "tokens" else None,
    )
