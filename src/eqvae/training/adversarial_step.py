"""One step of a generator against a discriminator, as a function of an explicit state: first one, then the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from eqvae.errors import NotFiniteError
from eqvae.generators.gat import GatObjective
from eqvae.generators.gat_transformer import GatDiscriminator, GatGenerator
from eqvae.generators.protocol import Loss
from eqvae.runtime.device import autocast
from eqvae.runtime.processes import Processes
from eqvae.training.checkpoints import load_optimizer_tensors, optimizer_tensors, sub_state
from eqvae.training.divergence import Guard
from eqvae.training.ema import Ema, PowerEma
from eqvae.training.generator_step import (
    GeneratorState,
    GeneratorTraining,
    TrainingBatch,
    build_optimizer,
    take_optimizer_step,
)


@dataclass(kw_only=True)
class AdversarialState(GeneratorState):
    """That of a generator with a discriminator, which is not averaged, and not exported."""

    generator: GatGenerator
    discriminator: GatDiscriminator
    discriminator_optimizer: Optimizer
    objective: GatObjective

    @property
    def transformer(self) -> GatGenerator:
        return self.generator

    @property
    def networks(self) -> tuple[GatGenerator, GatDiscriminator]:
        return self.generator, self.discriminator

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | self.discriminator_tensors()

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        super().load(tensors, step)
        self.load_discriminator(tensors)

    def discriminator_tensors(self) -> dict[str, Tensor]:
        """Collect the discriminator's part of the state."""
        named = {f"discriminator.{name}": value for name, value in self.discriminator.state_dict().items()}
        return named | optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer")

    def load_discriminator(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `discriminator_tensors` collected."""
        self.discriminator.load_state_dict(sub_state(tensors, "discriminator"))
        load_optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer", tensors)


def build_adversarial_state(
    generator: GatGenerator,
    discriminator: GatDiscriminator,
    objective: GatObjective,
    config: GeneratorTraining,
    device: torch.device,
) -> AdversarialState:
    """Set up training from first weights."""
    assert config.ema_decay is not None  # it is resolved
    generator, discriminator = generator.to(device).train(), discriminator.to(device).train()
    return AdversarialState(
        generator=generator,
        optimizer=build_optimizer(generator, config, device),
        average=Ema(generator, decay=config.ema_decay),
        power_averages=PowerEma(generator) if config.posthoc_ema else None,
        objective=objective,
        discriminator=discriminator,
        discriminator_optimizer=build_optimizer(discriminator, config, device),
    )


def adversarial_step(
    state: AdversarialState, batch: TrainingBatch, config: GeneratorTraining, processes: Processes
) -> dict[str, Tensor]:
    """Let the discriminator learn to tell true latents from drawn ones, then the generator from the discriminator.

    Each is one step of AdamW on the mean over the global batch; `batch` is this process's part of it. A step that is
    not finite leaves the state as it was.
    """
    objective, generator, discriminator = state.objective, state.generator, state.discriminator
    # Of every n steps the last: round numbers of steps, which the journal tells of, are among them.
    is_penalized = (state.step + 1) % objective.penalty_every == 0
    before = {name: value.clone() for name, value in state.discriminator_tensors().items()}

    def discriminate(part: TrainingBatch) -> Loss:
        return objective.discriminator_loss(
            generator, discriminator, part.latents, part.labels, part.draws, penalize=is_penalized
        )

    def generate(part: TrainingBatch) -> Loss:
        return objective.generator_loss(generator, discriminator, part.latents, part.labels, part.draws)

    figures, norm = _descend(
        discriminator, discriminate, state.discriminator_optimizer, state, batch, config, processes
    )
    del figures["loss"]  # the run's is the generator's
    figures["discriminator_gradient_norm"] = norm
    try:
        own, norm = _descend(generator, generate, state.optimizer, state, batch, config, processes)
    except NotFiniteError:
        state.load_discriminator(before)
        raise
    state.end_step()
    return figures | own | {"gradient_norm": norm}


def _descend(
    network: GatGenerator | GatDiscriminator,
    loss_of: Callable[[TrainingBatch], Loss],
    optimizer: Optimizer,
    state: AdversarialState,
    batch: TrainingBatch,
    config: GeneratorTraining,
    processes: Processes,
) -> tuple[dict[str, Tensor], Tensor]:
    """Take one step of one of the networks; returns the figures, and the gradient's norm."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    sums: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    for part in _parts(batch, config.gradient_accumulation_steps):
        with autocast(batch.latents.device, config.precision):
            loss = loss_of(part)
        (loss.total.sum() / len(batch.latents)).backward(inputs=trained)  # nothing for the other network's weights
        for name, value in {"loss": loss.total, **loss.parts}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().sum() / len(batch.latents)
    processes.average_gradients(trained)
    # All processes have to come to the same verdict, or one would wait for the others for ever.
    loss_of_all = processes.average(sums["loss"])
    # The discriminator's gradient is another one where it is penalized: nothing is usual for it.
    guard = state.guard if network is state.generator else Guard()
    norm = take_optimizer_step(
        network, optimizer, config, step=state.step, losses=sums | {"loss": loss_of_all}, guard=guard
    )
    return sums, norm


def _parts(batch: TrainingBatch, num_parts: int) -> Iterator[TrainingBatch]:
    size = len(batch.latents) // num_parts
    for index in range(num_parts):
        own = slice(index * size, (index + 1) * size)
        yield TrainingBatch(
            latents=batch.latents[own],
            labels=batch.labels[own],
            draws={name: value[own] for name, value in batch.draws.items()},
        )
