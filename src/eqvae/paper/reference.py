"""The statistics that all samples of a plan are measured against: computed once, read by every run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqvae.artifacts import CONFIG, METRICS, claim_output_folder, to_plain, write_json
from eqvae.artifacts.names import STATISTICS
from eqvae.artifacts.sample_sets import moments_in
from eqvae.images.image_sets import open_reference
from eqvae.metrics.statistics import compute_statistics, with_adm_moments
from eqvae.networks.features import INCEPTION, load_features
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.journal import write_environment
from eqvae.runtime.processes import join_processes


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Compute the feature statistics of a reference."""

    reference: str
    """An ADM reference batch (.npz) or any DATA."""

    out: Path
    """Output folder."""

    image_size: int
    """Side to which DATA is cropped, in px: the samples'."""

    features: str = INCEPTION
    """`inception` (FID), `efficientnet-lite0` (offline) or a model of timm."""

    precision: Precision = "fp32"
    """Of the features' convolutions, which must be that of the samples'."""

    batch_size: int = 64
    """Images at a time; changes no figure by more than rounding."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    num_workers: int = 1
    """Processes that decode images ahead."""


def write_reference(config: ReferenceConfig) -> dict[str, Any]:
    """Compute and write `statistics.safetensors`; mean and covariance that an ADM batch holds stand for its own."""
    claim_output_folder(config.out, "reference")
    processes = join_processes(choose_device(config.device))
    images = open_reference(config.reference, image_size_px=config.image_size)
    extractor = place(load_features(config.features), processes.device)
    with processes.progress("reference", total=-(-len(images) // processes.count), unit="image") as progress:
        statistics = compute_statistics(
            extractor,
            images,
            indices=range(len(images)),
            device=processes.device,
            processes=processes,
            precision=config.precision,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            on_batch=progress.advance if progress is not None else lambda num_images: None,
        )
    figures = {"num_images": len(images)}
    if not processes.is_first:
        return figures
    npz = Path(config.reference).expanduser()
    if config.features == INCEPTION and npz.suffix == ".npz" and moments_in(npz):
        statistics = with_adm_moments(statistics, npz)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / CONFIG, to_plain(config) | {"command": "reference"})
    write_environment(config.out, device=processes.device, seed=None)
    statistics.save(config.out / STATISTICS)
    write_json(config.out / METRICS, figures)
    return figures
