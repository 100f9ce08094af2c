"""`eqvae sample`: a trained generator and its decoder handed to a sampling run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.export import Generator, GeneratorCard, build_generator, read_generator
from eqvae.runs.sample_run import sample
from eqvae.runs.train_run import SNAPSHOTS
from eqvae.runtime.device import choose_device, place
from eqvae.runtime.processes import join_processes
from eqvae.sampling.config import SampleConfig
from eqvae.sampling.draw import Drawer
from eqvae.training.ema import find_snapshots, reconstruct


def sample_images(config: SampleConfig) -> dict[str, Any] | None:
    """Draw a sample set."""
    config.check()
    processes = join_processes(choose_device(config.device))
    run = Path(config.run)
    generator = read_generator(run, config.weights)
    if config.sigma_rel is not None:
        generator = _with_horizon(generator, run, config.sigma_rel)
    weak = read_generator(config.weak_run, config.weights) if config.weak_run is not None else None
    drawer = Drawer(
        generator=_on(generator, processes.device),
        autoencoder=place(_load_decoder(generator.card, config.autoencoder), processes.device),
        config=config,
        device=processes.device,
        weak=_on(weak, processes.device) if weak is not None else None,
    )
    figures = sample(drawer, processes)
    return figures if processes.is_first else None


def _load_decoder(card: GeneratorCard, name: str | None) -> Autoencoder:
    """Load the autoencoder whose latents the generator models, and no other."""
    name = name or card.autoencoder
    autoencoder = load_autoencoder(name)
    if autoencoder.fingerprint() != card.autoencoder_fingerprint:
        raise UserError(
            f"The generator models latents of '{card.autoencoder}' ({card.autoencoder_fingerprint}), and '{name}' has "
            f"other weights ({autoencoder.fingerprint()})",
            "Name the autoencoder that encoded its latents with --autoencoder",
        )
    return autoencoder


def _with_horizon(generator: Generator, run: Path, sigma_rel: float) -> Generator:
    """Mix the snapshots of power-function averages to the horizon that is asked for."""
    try:
        weights = reconstruct(find_snapshots(run / SNAPSHOTS), sigma_rel=sigma_rel, step=generator.card.num_steps)
    except ValueError as error:
        raise UserError(f"--sigma-rel: {error}", "0.05 and 0.1 are usual") from None
    return build_generator(generator.card, weights, source=str(run / SNAPSHOTS))


def _on(generator: Generator, device: torch.device) -> Generator:
    return replace(generator, transformer=generator.transformer.to(device))
