"""Looking at a generator while it trains: pictures, and distances of its samples to a reference."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eqvae.artifacts.files import expanded
from eqvae.artifacts.names import CONTACT_SHEETS, contact_sheet_name
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.generators.checkpoints import Generator
from eqvae.images.image_sets import open_reference
from eqvae.images.sources import announce_channels
from eqvae.latents.index import CacheIndex
from eqvae.metrics.comparison import check_comparable, kernel_distance
from eqvae.metrics.frechet import FeatureMoments, frechet_distance
from eqvae.metrics.statistics import (
    FeatureStatistics,
    Provenance,
    compute_statistics,
    find_adm_moments,
    read_statistics,
    with_adm_moments,
)
from eqvae.networks.features import FeatureExtractor, load_features, metric_key
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import place
from eqvae.runtime.processes import Processes
from eqvae.sampling.config import SamplerConfig
from eqvae.sampling.draw import Drawer, contact_sheet, sheet_indices

WATCH_BATCH_SIZE = 50
_WATCH_SUBSETS = 10
"""Of the kernel distance; `eqvae score` takes ten times as many."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are measured against, and by which features."""

    extractor: FeatureExtractor

    statistics: FeatureStatistics

    found: dict[str, Any] | None = None
    """Of its images."""

    @property
    def identity(self) -> dict[str, str]:
        """What `config.json` knows it by."""
        known = self.statistics.provenance
        return {"reference_fingerprint": known.fingerprint, "reference_moments": known.moments}

    @property
    def takes_moments_of_a_batch(self) -> bool:
        """Whether there were images, and an ADM batch's moments are taken in place of theirs."""
        return self.found is not None and self.statistics.provenance.moments == "file"


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
            config=SamplerConfig(
                sampler=config.watch_sampler, num_steps=config.watch_steps, seed=config.seed, precision=config.precision
            ),
            device=device,
        )
        if self.processes.is_first:
            shown = sheet_indices(config.num_watch_samples, drawer.num_classes)
            images = torch.cat(list(_drawn(drawer, shown)))
            contact_sheet(
                images, config.out / CONTACT_SHEETS / contact_sheet_name(step), row_names=drawer.row_names(shown)
            )
        if self.reference is None:
            return {}
        return self._distances(drawer, self.reference) | {"num_samples": config.num_watch_samples}

    def _distances(self, drawer: Drawer, reference: Reference) -> dict[str, float | int]:
        """Measure samples: their moments by the Frechet distance, the features themselves by the unbiased kernel's."""
        extractor, statistics, processes = reference.extractor, reference.statistics, self.processes
        moments, own = FeatureMoments(), range(self.config.num_watch_samples)[processes.rank :: processes.count]
        kept: list[Tensor] = []
        for images in _drawn(drawer, own):
            pooled = extractor.extract(images).pooled
            moments.add(pooled)
            kept.append(pooled.cpu())
        moments = moments.summed_over(processes)
        name = extractor.name
        distance = frechet_distance(
            moments.mean.cpu(), moments.covariance.cpu(), statistics.mean.cpu(), statistics.covariance.cpu()
        )
        figures: dict[str, float | int] = {metric_key(name): distance}
        if statistics.pooled is not None:  # an ADM batch may hold moments alone
            samples = _in_order(processes.gather(torch.cat([statistics.pooled[:0], *kept])))
            kernel = kernel_distance(reference=statistics.pooled, samples=samples, num_subsets=_WATCH_SUBSETS)
            figures[metric_key(name, "kid")] = kernel.value
        return figures


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    """Put together what processes drew in turns, so that subsets of it don't depend on their number."""
    rows = torch.empty((sum(map(len, parts)), parts[0].shape[1]))
    for rank, part in enumerate(parts):
        rows[rank :: len(parts)] = part
    return rows


def _drawn(drawer: Drawer, indices: Sequence[int]) -> Iterator[Tensor]:
    for start in range(0, len(indices), WATCH_BATCH_SIZE):
        yield drawer.images(indices[start : start + WATCH_BATCH_SIZE])


def load_reference(config: TrainConfig, index: CacheIndex, processes: Processes) -> Reference | None:
    """Compute or read the statistics that samples are measured against during the run."""
    if config.reference is None:
        return None
    announce_channels(index.image_channels)
    extractor = place(load_features(config.features), processes.device)
    statistics, found = read_statistics(expanded(config.reference)), None
    if statistics is not None:
        samples = Provenance(
            data=str(config.latents), fingerprint="", features=extractor.name,
            weights_fingerprint=extractor.weights_fingerprint, image_size_px=index.image_size().written(),
            num_channels=index.image_channels, precision="fp32",
        )  # fmt: skip
        check_comparable(samples=samples, reference=statistics.provenance)
    else:
        images = open_reference(
            config.reference, image_size_px=index.image_size(), image_column=config.reference_image_column,
            pixels=index.pixels,
        )  # fmt: skip
        images.announce("REFERENCE", processes)
        found = images.summary()
        statistics = compute_statistics(
            extractor, images, indices=range(len(images)), device=processes.device, processes=processes
        )
        if (batch := find_adm_moments(config.reference, config.features)) is not None:
            statistics = with_adm_moments(statistics, batch)
    return Reference(extractor=extractor, statistics=statistics, found=found)
