"""What a generator's training costs, worked out on the meta device: `eqvae train --dry-run`."""

from typing import Any

import torch

from eqvae.autoencoders import load_autoencoder
from eqvae.generators.gat import GatObjective
from eqvae.generators.gat_transformer import GatNetworkConfig
from eqvae.generators.protocol import Objective
from eqvae.generators.recipes import BackboneConfig
from eqvae.generators.transformer import Transformer
from eqvae.runs.train_config import Plan, TrainConfig, make_plan
from eqvae.runtime.device import choose_device, count_flops
from eqvae.runtime.processes import join_processes
from eqvae.runtime.run_folder import flat
from eqvae.training.adapters import add_block_adapters
from eqvae.training.ema import TRACKED_HORIZONS

_BYTES_PER_OPPOSED = 4 + 4 + 8 + 12
"""Of a discriminator, which is not averaged: weight, gradient, moments, and a copy for a step that fails."""


def describe_plan(config: TrainConfig) -> dict[str, Any]:
    """Work out what a run would do and cost: `--dry-run`."""
    from eqvae.runs.memory import training_memory  # its file takes the run's own steps

    config = config.resolved()
    processes = join_processes(choose_device(config.device))
    plan = make_plan(config, processes)
    memory = training_memory(plan, load_autoencoder(plan.decoder), processes)
    with torch.device("meta"):
        num_parameters = plan.transformer.build().num_parameters()
        num_opposed = _num_discriminator_parameters(plan.transformer)
    flops_per_step = training_flops(plan.transformer, plan.objective) * config.batch_size
    rows, columns = plan.transformer.grid
    latents = plan.transformer.latents
    return {
        "config": flat(config),
        "num_parameters": num_parameters,
        **({"num_discriminator_parameters": num_opposed} if num_opposed else {}),
        "latent_size": [plan.cache.index.latent_channels, latents.height, latents.width],
        "codebook_size": plan.cache.index.codebook_size,
        "num_tokens": rows * columns,
        "num_classes": latents.num_classes,
        "num_images": len(plan.cache),
        "epochs": config.max_steps * config.batch_size / len(plan.cache),
        "tflops_per_step": flops_per_step / 1e12,
        "tflops_total": flops_per_step * config.max_steps / 1e12,
        **memory.figures(),
        "state_gib": state_bytes(plan) / 2**30,
    }


def state_bytes(plan: Plan) -> int:
    """Count weights and averages of all parameters, gradients and two moments of those that are trained; all fp32."""
    lora_rank = plan.config.adaptation.lora_rank
    with torch.device("meta"):
        network = plan.transformer.build()
        if lora_rank is not None:
            assert isinstance(network, Transformer)  # others were refused
            add_block_adapters(network, lora_rank, seed=plan.config.seed)
    num_trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    num_copies = 2 + (len(TRACKED_HORIZONS) if plan.config.posthoc_ema else 0)
    opposed = _BYTES_PER_OPPOSED * _num_discriminator_parameters(plan.transformer)
    return 4 * (num_copies * network.num_parameters() + 3 * num_trained) + opposed


def transformer_flops(config: BackboneConfig) -> int:
    """Count the operations of one image's forward pass, on the meta device."""
    with torch.device("meta"):
        return count_flops(config.build(), *config.example())


def training_flops(config: BackboneConfig, objective: Objective | GatObjective) -> float:
    """Count the operations of training on one image: a backward pass is two forward passes.

    GAT's discriminator learns from two images, or four with its penalties; its generator draws once more before, and
    looks at what the discriminator says of two.
    """
    forward = transformer_flops(config)
    if not isinstance(config, GatNetworkConfig) or not isinstance(objective, GatObjective):
        return 3.0 * forward
    with torch.device("meta"):
        seen = count_flops(config.build_discriminator(), *config.discriminator_example())
    num_seen = 2 + 2 / objective.penalty_every
    return (1 + 3) * forward + (3 * num_seen + 1 + 2) * seen


def _num_discriminator_parameters(config: BackboneConfig) -> int:
    return config.build_discriminator().num_parameters() if isinstance(config, GatNetworkConfig) else 0
