"""`eqvae finetune AUTOENCODER --data DATA --out DIR`."""

import json
from collections.abc import Sequence

from eqvae.autoencoders import load_autoencoder
from eqvae.images import open_images
from eqvae.runs.arguments import parse
from eqvae.runs.finetune import finetune
from eqvae.runs.finetune_config import FinetuneConfig
from eqvae.runs.finetune_plan import plan
from eqvae.runtime.device import choose_device
from eqvae.runtime.run_folder import RunFolder


def command(arguments: Sequence[str]) -> None:
    """Fine-tune, or print the plan of it."""
    config = parse(FinetuneConfig, "finetune", arguments).resolved()
    if config.dry_run:
        print(json.dumps(plan(config, load_autoencoder(config.autoencoder)), indent=2))  # noqa: T201
        return
    # What is cheap to check comes before the autoencoder, which may be gigabytes from the hub.
    choose_device(config.device)
    open_images(config.data)
    open_images(config.validation_data, split="evaluation")
    RunFolder.claim(config.out, "finetune")
    figures = finetune(config, load_autoencoder(config.autoencoder))
    before, after = figures["before_equivariance_error_rotation"], figures["equivariance_error_rotation"]
    before_scale, after_scale = figures["before_equivariance_error_scale"], figures["equivariance_error_scale"]
    print(  # noqa: T201
        f"equivariance error: rotation {before:.3f} -> {after:.3f}, scale {before_scale:.3f} -> {after_scale:.3f}; "
        f"PSNR {figures['before_psnr_db']:.2f} -> {figures['psnr_db']:.2f} dB; model in '{config.out}'"
    )
