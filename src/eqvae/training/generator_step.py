"""One optimizer step of a generator as a function of an explicit state."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from eqvae.generators.alignment import ENDS
from eqvae.generators.gat_transformer import GatDiscriminator
from eqvae.generators.protocol import Latents, Objective
from eqvae.generators.recipes import Backbone
from eqvae.runtime.device import Precision, autocast
from eqvae.training.checkpoints import load_optimizer_tensors, optimizer_tensors, sub_state
from eqvae.training.divergence import Guard
from eqvae.training.ema import Ema, PowerEma
from eqvae.training.sharding import all_like, whole, whole_tensor


@runtime_checkable
class GeneratorTraining(Protocol):
    """What a step depends on, as the configuration of `eqvae train` has it once it is resolved."""

    @property
    def gradient_accumulation_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def lr_warmup_steps(self) -> int | None: ...
    @property
    def adam_beta1(self) -> float | None: ...
    @property
    def adam_beta2(self) -> float | None: ...
    @property
    def weight_decay(self) -> float | None: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def ema_decay(self) -> float | None: ...
    @property
    def posthoc_ema(self) -> bool: ...
    @property
    def precision(self) -> Precision: ...


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One process's part of a global batch."""

    latents: Latents
    """Normalized, without noise; or tokens."""

    labels: Int64[Tensor, " n"]

    draws: dict[str, Tensor] = field(default_factory=dict)
    """This process's rows of all random numbers of the step, and what else the objective looks at (REPA's teacher)."""

    images: dict[str, Tensor] = field(default_factory=dict)
    """Which images of the cache these are, and which of them mirrored: for a record of a step that went wrong."""

    def described(self) -> dict[str, list[Any]]:
        """Say which images these are."""
        return {name: value.tolist() for name, value in (self.images | {"labels": self.labels}).items()}


class Learner(nn.Module):
    """The transformer together with its objective: the forward pass is the loss, which is what processes share."""

    def __init__(self, transformer: Backbone, objective: Objective, precision: Precision) -> None:
        super().__init__()
        self.transformer, self.objective, self.precision = transformer, objective, precision

    def forward(self, latents: Latents, labels: Int64[Tensor, " n"], draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of each image."""
        with autocast(latents.device, self.precision):
            loss = self.objective.loss(self.transformer, latents, labels, draws)
        return {"loss": loss.total, **loss.parts}


@dataclass(kw_only=True)
class GeneratorState(ABC):
    """All that a resume needs; all other randomness follows from seed and step."""

    optimizer: Optimizer
    average: Ema
    power_averages: PowerEma | None
    step: int = 0
    guard: Guard = field(default_factory=Guard)
    """Looks at each step before it changes a weight."""

    @property
    @abstractmethod
    def transformer(self) -> Backbone:
        """The weights in training."""

    @property
    def networks(self) -> tuple[Backbone | GatDiscriminator, ...]:
        """All that is trained."""
        return (self.transformer,)

    def tensors(self) -> dict[str, Tensor]:
        """Collect the state for a checkpoint."""
        named = {f"model.{name}": value for name, value in self.transformer.state_dict().items()}
        named |= {f"ema.{name}": value for name, value in self.average.state_dict().items()}
        if self.power_averages is not None:
            named |= {f"power.{name}": value for name, value in self.power_averages.state_dict().items()}
        return whole(named | optimizer_tensors(self.optimizer, "optimizer"), everywhere=False)

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Put back what `tensors` collected."""
        self.transformer.load_state_dict(all_like(sub_state(tensors, "model"), self.transformer.state_dict()))
        self.average.load_state_dict(sub_state(tensors, "ema"))
        if self.power_averages is not None:
            self.power_averages.load_state_dict(sub_state(tensors, "power"))
        load_optimizer_tensors(self.optimizer, "optimizer", tensors)
        self.step = step

    def end_step(self) -> None:
        """Count the step and average what it made of the weights."""
        self.step += 1
        self.average.update(self.transformer)
        if self.power_averages is not None:
            self.power_averages.update(self.transformer)


@dataclass(kw_only=True)
class TrainState(GeneratorState):
    """That of a generator with an objective of its own."""

    learner: Learner

    align_steps: int = 0
    """The first steps, in which first and last layers alone are trained."""

    @property
    def transformer(self) -> Backbone:
        return self.learner.transformer


def build_state(
    transformer: Backbone,
    objective: Objective,
    config: GeneratorTraining,
    device: torch.device,
    *,
    align_steps: int = 0,
) -> TrainState:
    """Set up training from first weights."""
    assert config.ema_decay is not None  # it is resolved
    learner = Learner(transformer.to(device).train(), objective, config.precision)
    return TrainState(
        learner=learner,
        align_steps=align_steps,
        optimizer=build_optimizer(learner, config, device),
        average=Ema(transformer, decay=config.ema_decay),
        power_averages=PowerEma(transformer) if config.posthoc_ema else None,
    )


def build_optimizer(network: nn.Module, config: GeneratorTraining, device: torch.device) -> Optimizer:
    """Set up AdamW for all weights of a network."""
    assert config.learning_rate is not None and config.weight_decay is not None  # it is resolved
    assert config.adam_beta1 is not None and config.adam_beta2 is not None
    return AdamW(
        network.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def train_step(
    state: TrainState, batch: TrainingBatch, config: GeneratorTraining, shared: nn.Module
) -> dict[str, Tensor]:
    """Take one step: the mean loss over the global batch, its gradient, AdamW, the averages."""
    num_parts, size = config.gradient_accumulation_steps, len(batch.latents) // config.gradient_accumulation_steps
    sums: dict[str, Tensor] = {}
    state.optimizer.zero_grad(set_to_none=True)
    for index in range(num_parts):
        is_last = index == num_parts - 1
        alone = not is_last and isinstance(shared, nn.parallel.DistributedDataParallel)
        own = slice(index * size, (index + 1) * size)
        with shared.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            losses = shared(
                batch.latents[own], batch.labels[own], {name: value[own] for name, value in batch.draws.items()}
            )
            (losses["loss"].sum() / len(batch.latents)).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach().sum() / len(batch.latents)
    if state.step < state.align_steps:
        for name, parameter in state.transformer.named_parameters():
            if not name.startswith(ENDS):
                parameter.grad = None  # of what processes average, nothing can be left out beforehand
    sums["gradient_norm"] = take_optimizer_step(
        state.transformer, state.optimizer, config, step=state.step, losses=sums, guard=state.guard
    )
    state.end_step()
    return sums


def take_optimizer_step(
    network: nn.Module,
    optimizer: Optimizer,
    config: GeneratorTraining,
    *,
    step: int,
    losses: Mapping[str, Tensor],
    guard: Guard,
) -> Tensor:
    """Clip the gradient and follow it, unless it or its loss is not finite; returns its norm as it was before.

    Of several processes each looks at its own part's losses; the gradient is that of all, and so is its explosion.
    """
    norm = _clip(network, config.max_grad_norm or 0.0)
    terms = {**{name: value for name, value in losses.items() if name != "loss"}, "loss": losses["loss"]}
    # The only wait for the device in a step: weights must not change before this is known.
    values = torch.stack([*(value.detach().float() for value in terms.values()), norm.float()]).tolist()
    guard.check(dict(zip((*terms, "gradient norm"), values, strict=True)), loss="loss", exploding=("gradient norm",))
    _warm_up(optimizer, step, config)
    optimizer.step()
    return norm


def _clip(transformer: nn.Module, max_norm: float) -> Tensor:
    """Measure the gradient's norm, and clip it where a limit is set."""
    parameters = [parameter for parameter in transformer.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = whole_tensor(norm)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _warm_up(optimizer: Optimizer, step: int, config: GeneratorTraining) -> None:
    """Constant rate after a linear warm-up."""
    assert config.learning_rate is not None
    factor = min((step + 1) / config.lr_warmup_steps, 1.0) if config.lr_warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = factor * config.learning_rate
