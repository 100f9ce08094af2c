"""One training step as a function of an explicit state."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.finetune.adversarial import PatchDiscriminator, build_discriminator, hinge_loss
from eqvae.finetune.config import FinetuneConfig
from eqvae.finetune.equivariance import eq_vae_loss
from eqvae.finetune.explicit import explicit_loss
from eqvae.finetune.reconstruction import ReconstructionLoss
from eqvae.runtime.checkpoint import load_optimizer_tensors, optimizer_tensors, sub_state
from eqvae.runtime.device import autocast, place
from eqvae.runtime.seeds import generator_for
from eqvae.transforms import IDENTITY, Draw, TransformSampler


class NotFiniteError(ArithmeticError):
    """A loss or a gradient became NaN or infinite; the state was left as it was before the step."""


@dataclass(kw_only=True)
class TrainState:
    """All that a resume needs; all other randomness follows from seed and step."""

    autoencoder: Autoencoder
    optimizer: Optimizer
    discriminator: PatchDiscriminator | None
    discriminator_optimizer: Optimizer | None
    average: AveragedModel | None
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Collect the state for a checkpoint.

        Returns:
            Named tensors.
        """
        named = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        named |= optimizer_tensors(self.optimizer, "optimizer")
        if self.average is not None:
            named |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            named |= {f"discriminator.{name}": value for name, value in self.discriminator.state_dict().items()}
            named |= optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer")
        return named

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Put back what `tensors` collected.

        Args:
            tensors: Of the checkpoint.
            step: Steps done.
        """
        self.autoencoder.load_state_dict(sub_state(tensors, "autoencoder"))
        load_optimizer_tensors(self.optimizer, "optimizer", tensors)
        if self.average is not None:
            self.average.load_state_dict(sub_state(tensors, "average"))
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            self.discriminator.load_state_dict(sub_state(tensors, "discriminator"))
            load_optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer", tensors)
        self.step = step

    def exported(self) -> Autoencoder:
        """The autoencoder to validate and export: the averaged one where there is one."""
        return cast(Autoencoder, self.average.module) if self.average is not None else self.autoencoder


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step measured, averaged over its micro-batches."""

    branch: str
    """Of the first micro-batch."""

    transform: str
    """tau of the first micro-batch."""

    reconstruction: float
    """L_rec per value of the image: L1 + perceptual, weighing a scaled picture as `resolution_weighting` says."""

    l1: float
    """Mean absolute error between tau o x and D(tau o E(x)), images in [-1, 1]; unweighted."""

    kl: float
    """Nats per image."""

    explicit: float
    """Equation 4 per image; 0 where the objective is implicit."""

    adversarial: float
    """L_gan: minus the mean logit of reconstructions."""

    discriminator: float
    """Hinge loss: 1 is chance, 0 certainty."""

    adaptive_weight: float
    """lambda_gan; 0 during the discriminator's warm-up."""

    gradient_norm: float
    """Before clipping, of the loss per input value."""

    learning_rate: float
    """Of the autoencoder; 0 during the discriminator's warm-up."""


def build_state(autoencoder: Autoencoder, config: FinetuneConfig, device: torch.device) -> TrainState:
    """Prepare a run's first step.

    Args:
        autoencoder: The base; trained in place.
        config: Resolved.
        device: Where to train.

    Returns:
        The state before step 0.
    """
    set_training(place(autoencoder, device))
    discriminator = build_discriminator(config.seed) if config.adversarial_weight > 0 else None

    def adamw(module: torch.nn.Module) -> Optimizer:
        return AdamW(
            module.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )

    average = None
    if config.ema_decay > 0:
        average = AveragedModel(autoencoder, multi_avg_fn=_moving_average(config.ema_decay), use_buffers=True)
        average.requires_grad_(False)
    if discriminator is not None:
        place(discriminator, device).train()
    return TrainState(
        autoencoder=autoencoder,
        optimizer=adamw(autoencoder),
        discriminator=discriminator,
        discriminator_optimizer=adamw(discriminator) if discriminator is not None else None,
        average=average,
    )


def set_training(autoencoder: Autoencoder) -> None:
    """Training mode, but for batch normalization, which keeps its statistics: batches of mixed scales would spoil them.

    Args:
        autoencoder: Changed in place.
    """
    autoencoder.train()
    for module in autoencoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def _moving_average(decay: float):
    """Exponential moving average whose horizon grows with the run, so that it soon lets go of the base."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        count = float(num_averaged)
        weight = 1.0 - min(decay, (1.0 + count) / (10.0 + count))
        floating = [pair for pair in zip(averaged, current, strict=True) if pair[0].is_floating_point()]
        torch._foreach_lerp_([pair[0] for pair in floating], [pair[1] for pair in floating], weight)
        for mean, value in zip(averaged, current, strict=True):
            if not mean.is_floating_point():
                mean.copy_(value)

    return update


def learning_rate_at(step: int, config: FinetuneConfig, *, first_step: int) -> float:
    """Linear warm-up, then constant or half a cosine to zero.

    Args:
        step: Counts from 0.
        config: Resolved.
        first_step: The first step of what is trained: 0 for the discriminator, the end of its warm-up for the
            autoencoder.

    Returns:
        The rate of this step.
    """
    warmup = config.lr_warmup_steps or 0
    done = step - first_step
    rate = config.learning_rate * min(1.0, (done + 1) / (warmup + 1))
    if config.lr_scheduler == "cosine":
        progress = max(done - warmup, 0) / max(config.max_steps - first_step - warmup, 1)
        rate *= 0.5 * (1.0 + math.cos(math.pi * progress))
    return rate


def train_step(
    state: TrainState,
    x: Float[Tensor, "n 3 h w"],
    config: FinetuneConfig,
    reconstruction_loss: ReconstructionLoss,
    sampler: TransformSampler,
) -> StepRecord:
    """Take one optimizer step of Equation 7; one reconstruction serves autoencoder and discriminator.

    Args:
        state: Changed in place.
        x: The batch, on the state's device, in [-1, 1].
        config: Resolved.
        reconstruction_loss: L_rec.
        sampler: Draws tau.

    Returns:
        What was measured.

    Raises:
        NotFiniteError: If a loss or gradient is NaN or infinite; nothing was updated then.
    """
    first_step = config.discriminator_warmup_steps or 0
    warming_up = state.step < first_step
    rate = 0.0 if warming_up else learning_rate_at(state.step, config, first_step=first_step)
    state.autoencoder.requires_grad_(not warming_up)
    for parameter in state.autoencoder.encoder_parameters() if config.freeze_encoder else ():
        parameter.requires_grad_(False)
    for optimizer in (state.optimizer, state.discriminator_optimizer):
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
    latent_size = (x.shape[-2] // state.autoencoder.stride, x.shape[-1] // state.autoencoder.stride)
    statistics = _running_statistics(state)
    former_statistics = [tensor.clone() for tensor in statistics]
    parts, draws = x.chunk(config.gradient_accumulation_steps), []
    sums: dict[str, float] = {}
    for index, part in enumerate(parts):
        generator = generator_for(config.seed, state.step, index)
        draws.append(sampler.draw(latent_size, generator))
        losses = _accumulate(state, part, draws[-1], generator, config, reconstruction_loss)
        sums = {name: sums.get(name, 0.0) + value / len(parts) for name, value in losses.items()}

    norm = _clip(state.autoencoder, config.max_grad_norm)
    norms = [norm] if state.discriminator is None else [norm, _clip(state.discriminator, config.max_grad_norm)]
    if not all(math.isfinite(value) for value in (*sums.values(), *norms)):
        for tensor, former in zip(statistics, former_statistics, strict=True):
            tensor.copy_(former)
        raise NotFiniteError(", ".join(f"{name} {value:.4g}" for name, value in {**sums, "gradient": norm}.items()))
    if state.discriminator_optimizer is not None:
        _step(state.discriminator_optimizer, learning_rate_at(state.step, config, first_step=0))
    if not warming_up:
        _step(state.optimizer, rate)
        if state.average is not None:
            state.average.update_parameters(state.autoencoder)
    state.step += 1
    return StepRecord(
        branch=draws[0].branch,
        transform=str(draws[0].tau),
        gradient_norm=norm,
        learning_rate=rate,
        **sums,
    )


def _running_statistics(state: TrainState) -> list[Tensor]:
    """The buffers of batch normalizations: a forward pass changes them, so a step that fails has to put them back."""
    modules = [state.autoencoder] if state.discriminator is None else [state.autoencoder, state.discriminator]
    return [buffer for module in modules for buffer in module.buffers()]


def _accumulate(
    state: TrainState,
    x: Float[Tensor, "n 3 h w"],
    draw: Draw,
    generator: torch.Generator,
    config: FinetuneConfig,
    reconstruction_loss: ReconstructionLoss,
) -> dict[str, float]:
    """Add one micro-batch's gradients to those of the autoencoder, unless it is frozen, and of the discriminator."""
    autoencoder, discriminator = state.autoencoder, state.discriminator
    num_values, num_parts = x[0].numel(), config.gradient_accumulation_steps
    x = draw.before(x).contiguous(memory_format=torch.channels_last)
    latent_shape = (len(x), autoencoder.latent_channels, *(side // autoencoder.stride for side in x.shape[-2:]))
    noise = torch.randn(latent_shape, generator=generator).to(x.device)
    implicit = config.objective == "implicit"
    explicit = discriminator_loss = x.new_zeros(())

    def weighted_reconstruction_loss(target: Tensor, reconstruction: Tensor) -> Tensor:
        loss = reconstruction_loss(target, reconstruction)
        return loss * (num_values / target[0].numel()) if config.resolution_weighting == "equal" else loss

    with autocast(x.device, config.precision):
        objective = eq_vae_loss(
            autoencoder,
            x,
            draw.tau if implicit else IDENTITY,
            noise,
            reconstruction_loss=weighted_reconstruction_loss,
            discriminator=discriminator,
        )
        if not implicit and draw.branch == "equivariance":
            stop_gradient = config.objective == "explicit-stop-gradient"
            explicit = explicit_loss(autoencoder, x, objective.latent, draw.tau, stop_gradient=stop_gradient).mean()
        if discriminator is not None and objective.fake_logits is not None:
            discriminator_loss = hinge_loss(discriminator(objective.target), objective.fake_logits)

    adaptive_weight = x.new_zeros(())
    if objective.decoded.requires_grad:
        adaptive_weight = objective.backward(
            autoencoder.last_layer.weight,
            adversarial_weight=config.adversarial_weight,
            regularization=config.kl_weight * objective.regularization.mean() + config.explicit_weight * explicit,
            factor=1.0 / (num_values * num_parts),
        )
    if discriminator is not None:
        (discriminator_loss / num_parts).backward(inputs=list(discriminator.parameters()))
    figures = {
        "reconstruction": objective.reconstruction.mean() / num_values,
        "l1": (objective.target - objective.seam).abs().mean(),
        "kl": objective.regularization.mean(),
        "explicit": explicit,
        "adversarial": objective.adversarial.mean(),
        "discriminator": discriminator_loss,
        "adaptive_weight": adaptive_weight,
    }
    # One transfer, and so one wait for the device, for all of them.
    return dict(zip(figures, torch.stack([value.detach().float() for value in figures.values()]).tolist(), strict=True))


def _clip(module: torch.nn.Module, max_norm: float) -> float:
    """Clip the gradient's norm where asked for, and return what it was; 0 where there is no gradient."""
    gradients = [parameter for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:
        return 0.0
    return float(torch.nn.utils.clip_grad_norm_(gradients, max_norm if max_norm > 0 else math.inf))


def _step(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
