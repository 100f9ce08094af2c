"""The state of a run: all that a resume needs, in one record."""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.losses.adversarial import LogitAverages
from eqvae.losses.codebook import CodebookState
from eqvae.losses.discriminator_files import begin_discriminator
from eqvae.losses.discriminators import Discriminator
from eqvae.runtime.device import place
from eqvae.training.adapters import add_adapters, has_adapters, merged, trained_parameters
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.checkpoints import load_optimizer_tensors, optimizer_tensors, sub_state
from eqvae.training.divergence import Guard
from eqvae.training.ema import Ema


@dataclass(kw_only=True)
class TrainState:
    """All that a resume needs; all other randomness follows from seed and step."""

    autoencoder: Autoencoder
    optimizer: Optimizer
    discriminator: Discriminator | None
    discriminator_optimizer: Optimizer | None
    average: Ema | None
    averaged: Autoencoder | None
    """Holds the averaged weights; never trained itself."""

    logit_averages: LogitAverages | None = None
    """Of the discriminator, where LeCam regularizes it."""

    codebook: CodebookState | None = None
    """Of a discrete autoencoder whose codes are averaged or restarted."""

    parts: dict[str, nn.Module] = field(default_factory=dict)
    """What methods learn and look through."""

    learned: dict[str, nn.Parameter] = field(default_factory=dict)
    """Of these what is trained and kept with the autoencoder; it is not exported."""

    step: int = 0

    guard: Guard = field(default_factory=Guard)
    """Looks at each step before it changes a weight."""

    def trained(self) -> list[nn.Parameter]:
        """All that the autoencoder's optimizer steps."""
        return [*trained_parameters(self.autoencoder), *self.learned.values()]

    def trained_discriminator(self) -> list[nn.Parameter]:
        """All that the discriminator's optimizer steps."""
        return [] if self.discriminator is None else list(self.discriminator.learned.parameters())

    def running_statistics(self) -> list[Tensor]:
        """What a forward pass changes, buffers of normalizations: a step that fails has to put them back."""
        modules = [self.autoencoder] if self.discriminator is None else [self.autoencoder, self.discriminator.learned]
        return [buffer for module in modules for buffer in module.buffers()]

    def tensors(self) -> dict[str, Tensor]:
        """Collect the state for a checkpoint."""
        named = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        named |= optimizer_tensors(self.optimizer, "optimizer")
        named |= {f"parts.{name}": parameter.detach() for name, parameter in self.learned.items()}
        if self.average is not None:
            named |= {f"average.module.{name}": value for name, value in self.average.weights().items()}
            named["average.n_averaged"] = torch.tensor(self.average.num_updates)
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            state = self.discriminator.learned.state_dict()
            named |= {f"discriminator.{name}": value for name, value in state.items()}
            named |= optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer")
        if self.logit_averages is not None:
            named |= {f"logit_averages.{name}": value for name, value in self.logit_averages.tensors().items()}
        if self.codebook is not None:
            named |= {f"codebook.{name}": value for name, value in self.codebook.tensors().items()}
        return named

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Put back what `tensors` collected."""
        self.autoencoder.load_state_dict(sub_state(tensors, "autoencoder"))
        load_optimizer_tensors(self.optimizer, "optimizer", tensors)
        for name, parameter in self.learned.items():
            parameter.detach().copy_(tensors[f"parts.{name}"])
        if self.average is not None:
            averages = sub_state(tensors, "average.module")
            self.average.load_state_dict({**averages, "num_updates": tensors["average.n_averaged"]})
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            self.discriminator.learned.load_state_dict(sub_state(tensors, "discriminator"))
            load_optimizer_tensors(self.discriminator_optimizer, "discriminator_optimizer", tensors)
        if self.logit_averages is not None:
            self.logit_averages.load(sub_state(tensors, "logit_averages"))
        if self.codebook is not None:
            self.codebook.load(sub_state(tensors, "codebook"))
        self.step = step

    def begin_polish(self) -> None:
        """Go on from the weights that would be exported, with fresh moments: their encoder is the one that stays."""
        if self.average is not None and self.averaged is not None:
            self.autoencoder.load_state_dict(self.averaged.state_dict())
            self.average.num_updates = 0
        self.optimizer.state.clear()

    def exported(self) -> Autoencoder:
        """The autoencoder to validate and export: the averaged one where there is one, adapters merged."""
        found = self.autoencoder if self.averaged is None else self.averaged
        return merged(found) if has_adapters(found) else found


def build_state(
    autoencoder: Autoencoder,
    config: AutoencoderTraining,
    device: torch.device,
    *,
    image_size_px: int = 256,
    discriminator: Discriminator | None = None,
) -> TrainState:
    """Prepare a run's first step; where no discriminator is given, it begins as the configuration says."""
    if config.lora_rank:
        add_adapters(autoencoder, config.lora_rank, seed=config.seed)
    set_training(place(autoencoder, device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # what methods learn begins alike in each process
        parts = config.mixture().build(autoencoder, image_size_px=image_size_px)
    learned = {
        f"{key}.{name}": parameter
        for key, part in parts.items()
        for name, parameter in part.to(device).named_parameters()
        if parameter.requires_grad
    }
    if discriminator is None:
        discriminator = begin_discriminator(config.adversarial, config.seed, autoencoder.image_channels)

    def adamw(*parameters: nn.Parameter) -> Optimizer:
        return AdamW(
            parameters,
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
            weight_decay=config.optimizer.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )

    average, averaged = None, None
    if config.optimizer.ema_decay > 0:
        averaged = copy.deepcopy(autoencoder).requires_grad_(False)
        average = Ema(autoencoder, decay=config.optimizer.ema_decay, warm_up=True, twin=averaged)
    if discriminator is not None:
        place(discriminator, device).train()
    codebook = None
    if isinstance(autoencoder, DiscreteAutoencoder) and (
        config.codes.codebook == "ema" or config.codes.restart_dead_codes
    ):
        codebook = CodebookState.begin(autoencoder.codebook)
    return TrainState(
        autoencoder=autoencoder,
        optimizer=adamw(*trained_parameters(autoencoder), *learned.values()),
        discriminator=discriminator,
        discriminator_optimizer=adamw(*discriminator.learned.parameters()) if discriminator is not None else None,
        average=average,
        averaged=averaged,
        logit_averages=LogitAverages() if config.adversarial.discriminator_regularization == "lecam" else None,
        codebook=codebook,
        parts=parts,
        learned=learned,
    )


def set_training(autoencoder: Autoencoder) -> None:
    """Training mode, but for batch normalization: batches of mixed scales would spoil its statistics."""
    autoencoder.train()
    for module in autoencoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
