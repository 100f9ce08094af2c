"""The state of a run: all that a resume needs, in one record."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.losses.adversarial import PatchDiscriminator, build_discriminator
from eqvae.losses.codebook import CodebookState
from eqvae.runs.finetune_config import FinetuneConfig
from eqvae.runtime.device import place
from eqvae.training.checkpoint import load_optimizer_tensors, optimizer_tensors, sub_state


@dataclass(kw_only=True)
class TrainState:
    """All that a resume needs; all other randomness follows from seed and step."""

    autoencoder: Autoencoder
    optimizer: Optimizer
    discriminator: PatchDiscriminator | None
    discriminator_optimizer: Optimizer | None
    average: AveragedModel | None
    codebook: CodebookState | None = None
    """Of a discrete autoencoder whose codes are averaged or restarted."""

    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Collect the state for a checkpoint."""
        named = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        named |= optimizer_tensors(self.optimizer, "optimizer")
        if self.average is not None:
            named |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            named |= {f"discriminator.{name}": value for name, value in self.discriminator.state_dict().items()}
            named |= optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer")
        if self.codebook is not None:
            named |= {f"codebook.{name}": value for name, value in self.codebook.tensors().items()}
        return named

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Put back what `tensors` collected."""
        self.autoencoder.load_state_dict(sub_state(tensors, "autoencoder"))
        load_optimizer_tensors(self.optimizer, "optimizer", tensors)
        if self.average is not None:
            self.average.load_state_dict(sub_state(tensors, "average"))
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            self.discriminator.load_state_dict(sub_state(tensors, "discriminator"))
            load_optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer", tensors)
        if self.codebook is not None:
            self.codebook.load(sub_state(tensors, "codebook"))
        self.step = step

    def exported(self) -> Autoencoder:
        """The autoencoder to validate and export: the averaged one where there is one."""
        return cast(Autoencoder, self.average.module) if self.average is not None else self.autoencoder


def build_state(autoencoder: Autoencoder, config: FinetuneConfig, device: torch.device) -> TrainState:
    """Prepare a run's first step."""
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
    codebook = None
    if isinstance(autoencoder, DiscreteAutoencoder) and (config.codebook == "ema" or config.restart_dead_codes):
        codebook = CodebookState.begin(autoencoder.codebook)
    return TrainState(
        autoencoder=autoencoder,
        optimizer=adamw(autoencoder),
        discriminator=discriminator,
        discriminator_optimizer=adamw(discriminator) if discriminator is not None else None,
        average=average,
        codebook=codebook,
    )


def set_training(autoencoder: Autoencoder) -> None:
    """Training mode, but for batch normalization: batches of mixed scales would spoil its statistics."""
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
