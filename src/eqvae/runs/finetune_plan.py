"""What a run would do and cost, without doing it: `--dry-run`."""

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from eqvae.artifacts import to_plain
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.metrics.autoencoder import check_image_size
from eqvae.runs.finetune_config import FinetuneConfig

_BYTES_PER_PARAMETER = 4 + 4 + 8 + 4
"""Weight, gradient, two moments of AdamW, moving average; all fp32."""


def plan(config: FinetuneConfig, autoencoder: Autoencoder) -> dict[str, Any]:
    """Work out sizes, FLOPs and memory on PyTorch's meta device."""
    config = config.resolved()
    config.check_autoencoder(autoencoder)
    check_image_size(config.image_size, autoencoder.stride, quarters=True)
    num_images = config.batch_size // config.gradient_accumulation_steps
    model = copy.deepcopy(autoencoder).to("meta", torch.bfloat16 if config.precision == "bf16" else torch.float32)
    x = torch.empty(
        num_images, 3, config.image_size, config.image_size, device="meta", dtype=next(model.parameters()).dtype
    )
    saved_bytes = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved_bytes
        saved_bytes += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        z = model.encode(x).mode()
        model.decode(z)
    forward_flops_per_image = counter.get_total_flops() / num_images
    return {
        "config": to_plain(config),
        "num_parameters": autoencoder.num_parameters(),
        "latent_size": [autoencoder.latent_channels, *z.shape[-2:]],
        "tflops_per_step": 3 * forward_flops_per_image * config.batch_size / 1e12,
        "tflops_total": 3 * forward_flops_per_image * config.batch_size * config.max_steps / 1e12,
        "memory_gib": (saved_bytes + _BYTES_PER_PARAMETER * autoencoder.num_parameters()) / 2**30,
    }
