"""What is looked at during training: a contact sheet, and the samples' distance to a reference."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import Generator
from eqvae.images.image_sets import open_reference
from eqvae.metrics.frechet import FeatureMoments, frechet_distance
from eqvae.metrics.statistics import FeatureStatistics, compute_statistics, holds_statistics
from eqvae.networks.features import FeatureExtractor, load_features, metric_key
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import place
from eqvae.runtime.processes import Processes
from eqvae.sampling.config import SamplerConfig
from eqvae.sampling.draw import Drawer, contact_sheet, sheet_indices

SAMPLES = "samples"
"""Folder of the contact sheets."""

_BATCH_SIZE = 50


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are measured against, and by which features."""

    extractor: FeatureExtractor

    statistics: FeatureStatistics


@dataclass(frozen=True, kw_only=True)
class SampleWatch:
    """Draws the same images (seed and indices) after each stretch of training; every process draws its part."""

    config: TrainConfig

    generator: Callable[[], Generator]
    """The averaged weights as they are now."""

    autoencoder: Autoencoder

    reference: Reference | None

    processes: Processes

    def __call__(self, step: int) -> dict[str, float | int]:
        """Draw pictures and measure."""
        generator, config, device = self.generator(), self.config, self.processes.device
        generator.transformer.to(device)
        drawer = Drawer(
            generator=generator,
            autoencoder=self.autoencoder,
            config=SamplerConfig(num_steps=config.watch_steps, seed=config.seed, precision=config.precision),
            device=device,
        )
        if self.processes.is_first:
            shown = sheet_indices(config.num_watch_samples, drawer.num_classes)
            parts = [drawer.images(shown[start : start + _BATCH_SIZE]) for start in range(0, len(shown), _BATCH_SIZE)]
            contact_sheet(torch.cat(parts), config.out / SAMPLES / f"step_{step:07d}.png")
        if self.reference is None:
            return {}
        moments, own = FeatureMoments(), range(config.num_watch_samples)[self.processes.rank :: self.processes.count]
        for start in range(0, len(own), _BATCH_SIZE):
            images = drawer.images(own[start : start + _BATCH_SIZE])
            moments.add(self.reference.extractor.extract(images).pooled)
        moments = moments.summed_over(self.processes)
        statistics = self.reference.statistics
        distance = frechet_distance(
            moments.mean.cpu(), moments.covariance.cpu(), statistics.mean.cpu(), statistics.covariance.cpu()
        )
        return {metric_key(self.reference.extractor.name): distance, "num_samples": config.num_watch_samples}


def load_reference(config: TrainConfig, image_size_px: int, processes: Processes) -> Reference | None:
    """Compute or read the statistics that samples are measured against during the run."""
    if config.reference is None:
        return None
    extractor = place(load_features(config.features), processes.device)
    path = Path(config.reference).expanduser()
    if holds_statistics(path):
        statistics = FeatureStatistics.load(path)
        if statistics.provenance.features != extractor.name:
            raise UserError(
                f"--reference '{path}' holds statistics of {statistics.provenance.features}",
                f"Use --features {statistics.provenance.features}, or write others with 'eqvae score --save-reference'",
            )
        return Reference(extractor=extractor, statistics=statistics)
    images = open_reference(config.reference, image_size_px=image_size_px)
    statistics = compute_statistics(
        extractor, images, indices=range(len(images)), device=processes.device, processes=processes
    )
    return Reference(extractor=extractor, statistics=statistics)
