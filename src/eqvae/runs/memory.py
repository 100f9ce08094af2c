"""What `finetune`, `train` and `sample` take of a device's memory: shown by --dry-run, checked before they begin."""

import math
from dataclasses import replace
from typing import Any

import torch

from eqvae.artifacts.files import as_written
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.generators.checkpoints import Generator, GeneratorCard
from eqvae.generators.repa import TEACHER_TOKENS
from eqvae.images.sizes import ImageSize, largest
from eqvae.losses.discriminators import Discriminator
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.methods.mixture import Mixture
from eqvae.metrics.autoencoder import evaluate_autoencoder
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.train import first_state
from eqvae.runs.train_config import Plan
from eqvae.runs.train_cost import state_bytes
from eqvae.runs.train_watch import WATCH_BATCH_SIZE
from eqvae.runtime.heap import Heap
from eqvae.runtime.memory import Memory, free_bytes, measure, without_values
from eqvae.runtime.processes import Processes
from eqvae.runtime.seeds import generator_for
from eqvae.sampling.config import SamplerConfig
from eqvae.sampling.draw import Drawer
from eqvae.training.adversarial_step import AdversarialState, adversarial_step
from eqvae.training.autoencoder_state import build_state, set_training
from eqvae.training.autoencoder_step import train_step
from eqvae.training.generator_step import TrainingBatch, TrainState
from eqvae.training.generator_step import train_step as train_generator_step

_BYTES_PER_PIXEL = 2**17
"""More than an autoencoder of SD-VAE's size keeps for the backward pass, in fp32."""

_SD_VAE_PARAMETERS = 84e6


def is_beyond_doubt(num_parameters: int, num_pixels: int | float, device: torch.device) -> bool:
    """Whether a crude bound shows already that there is room: working it out takes seconds.

    Pixels are of all images whose activations are kept; of images that are only decoded, an eighth.
    """
    bound = 24 * num_parameters + num_pixels * _BYTES_PER_PIXEL * math.sqrt(num_parameters / _SD_VAE_PARAMETERS)
    return bound < free_bytes(device) / 2


def finetuning_memory(
    config: FinetuneConfig, autoencoder: Autoencoder, discriminator: Discriminator | None, processes: Processes
) -> Memory:
    """Validate, take two steps on plain pictures, the second with moments, and one as the method draws it, and save."""
    training, device, state = config.training, processes.device, dict[str, Any]()
    mixture = training.mixture()
    plain = replace(mixture, pairs=tuple((0.0, pair) for _, pair in mixture.pairs))
    terms = training.reconstruction
    loss = ReconstructionLoss(terms.perceptual, terms.perceptual_weight)
    alone = replace(processes, rank=0, count=1)

    def images(size: ImageSize) -> torch.Tensor:
        count = training.batch_size // processes.count
        return torch.empty(count, autoencoder.image_channels, *size, device=device)

    def begin() -> None:
        judge = None if discriminator is None else without_values(discriminator, device)
        trained = without_values(autoencoder, device)
        state["all"] = build_state(trained, training, device, discriminator=judge)
        state["all"].step = training.adversarial.discriminator_warmup_steps or 0
        state["loss"] = without_values(loss, device)

    def validate() -> None:
        batch = images(config.validation_size)[: config.num_validation_images]
        evaluate_autoencoder(state["all"].exported(), [batch], processes=alone, precision=training.precision)
        set_training(state["all"].autoencoder)

    def step_with(drawn: Mixture) -> None:
        x = images(largest(sum(config.sizes(autoencoder.stride), ())))
        train_step(state["all"], x, training, state["loss"], drawn, alone)

    judges = [] if discriminator is None else [discriminator]
    return measure(
        device,
        *(autoencoder, loss, *judges),
        state=begin,
        validation=validate,
        first_step=lambda: step_with(plain),
        step=lambda: step_with(plain),
        method_step=lambda: step_with(mixture),
        checkpoint=lambda: as_written(state["all"].tensors()),
    )


def training_memory(plan: Plan, autoencoder: Autoencoder, processes: Processes) -> Memory:
    """Take two steps of this process, and look at samples; others' shards are taken off the state of one process."""
    config, device, parts = plan.config, processes.device, dict[str, Any]()
    latents, card = plan.largest_latents, plan.card(decoder_fingerprint="")
    with torch.device("meta"):
        transformer = plan.transformer.build()

    def begin() -> None:
        parts["decoder"] = without_values(autoencoder, device)
        parts["state"] = first_state(without_values(transformer, device), plan, device)
        for network in parts["state"].networks:
            network.gradient_checkpointing = config.gradient_checkpointing

    def step() -> None:
        size = config.batch_size // processes.count
        draws = plan.objective.draw(size, latents, generator_for(0))
        if plan.recipe.models == "tokens":
            values = torch.zeros(size, latents.height, latents.width, dtype=torch.int64)
        else:
            values = torch.empty(size, *latents.shape)
        if plan.teacher is not None:
            rows, columns = plan.transformer.grid
            draws |= {TEACHER_TOKENS: torch.empty(size, rows * columns, plan.teacher.channels)}
        batch = TrainingBatch(
            latents=values.to(device),
            labels=torch.zeros(size, dtype=torch.int64, device=device),
            draws={name: value.to(device) for name, value in draws.items()},
        )
        for _ in range(2):
            _learn(parts["state"], batch, config, replace(processes, rank=0, count=1))

    def samples() -> None:
        drawn = without_values(transformer, device)
        sampler = SamplerConfig(sampler=config.watch_sampler, precision=config.precision)
        drawer = Drawer(
            generator=Generator(card=card, transformer=drawn), autoencoder=parts["decoder"],
            config=_in_few_steps(sampler, card), device=device,
        )  # fmt: skip
        drawer.images(range(min(config.num_watch_samples, WATCH_BATCH_SIZE)))

    memory = measure(
        device, autoencoder, heap=Heap.giving_back_at_once() if config.gradient_checkpointing else None,
        state=begin, step=step, samples=samples,
        checkpoint=lambda: as_written(parts["state"].tensors()),
    )  # fmt: skip
    if config.shard and processes.count > 1:
        saved = int(state_bytes(plan) * (1 - 1 / processes.count))
        memory = replace(memory, phases={name: max(size - saved, 0) for name, size in memory.phases.items()})
    return memory


def _learn(state: Any, batch: TrainingBatch, config: Any, alone: Processes) -> None:
    if isinstance(state, AdversarialState):
        adversarial_step(state, batch, config, alone)
    elif isinstance(state, TrainState):
        train_generator_step(state, batch, config, state.learner)


def _in_few_steps(config: SamplerConfig, card: GeneratorCard) -> SamplerConfig:
    """Take two steps where a generator takes several: more take no more memory."""
    if config.sampler == "dopri5":  # chooses its steps by values, which there are none of
        config = replace(config, sampler="euler", rtol=SamplerConfig.rtol, atol=SamplerConfig.atol)
    # All are guided: which are at the time of a step is a matter of values too, and fewer take less.
    return replace(config, num_steps=1 if card.kind.draws == "pass" else 2, guidance_low=0.0, guidance_high=1.0)


def sampling_memory(drawer: Drawer, num_images: int) -> Memory:
    """Draw and decode a batch, in few steps instead of many."""

    def samples() -> None:
        def without(generator: Generator) -> Generator:
            network = without_values(generator.transformer, drawer.device)
            return replace(generator, transformer=network)

        one = replace(
            drawer,
            generator=without(drawer.generator),
            autoencoder=without_values(drawer.autoencoder, drawer.device),
            config=_in_few_steps(drawer.config, drawer.generator.card),
            weak=without(drawer.weak) if drawer.weak is not None else None,
        )
        one.images(range(num_images))

    weak = [drawer.weak.transformer] if drawer.weak is not None else []
    return measure(drawer.device, drawer.generator.transformer, drawer.autoencoder, *weak, samples=samples)
