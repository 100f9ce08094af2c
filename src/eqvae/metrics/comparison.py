"""Two sets of images compared by their statistics: every figure of a score, and where each comes from."""

from dataclasses import asdict
from typing import Any

import torch

from eqvae.errors import UserError
from eqvae.metrics.frechet import frechet_distance
from eqvae.metrics.inception_score import inception_score
from eqvae.metrics.kernel_distance import kernel_distance
from eqvae.metrics.precision_recall import precision_recall
from eqvae.metrics.statistics import FeatureStatistics, Provenance
from eqvae.networks.features import INCEPTION, metric_key


def score_features(
    *,
    samples: FeatureStatistics,
    reference: FeatureStatistics,
    num_neighbours: int = 3,
    split_size: int = 5000,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Compare two sets by their statistics. Named arguments only, so that they can't be swapped."""
    check_comparable(samples=samples.provenance, reference=reference.provenance)
    for statistics in (samples, reference):
        if statistics.pooled is not None:
            check_enough(statistics.provenance.data, len(statistics.pooled), num_neighbours)
    if samples.pooled is None:
        raise UserError(f"'{samples.provenance.data}' holds moments, no features", "Give it as the reference")
    # MPS has no float64, which moments and eigenvalues need.
    device = torch.device("cpu") if device is None or device.type == "mps" else device
    name = samples.provenance.features
    figures = _frechet_distances(samples, reference, device)
    settings: dict[str, Any] = {}
    left_out = [metric_key(name, measure) for measure in ("kid", "precision", "recall")]
    if name == INCEPTION and "sfid" not in figures:
        left_out.append("sfid")
    if reference.pooled is not None:
        real, fake = reference.pooled.to(device), samples.pooled.to(device)
        kernel = kernel_distance(
            reference=real, samples=fake, num_subsets=kid_subsets, subset_size=kid_subset_size, seed=seed
        )
        shares = precision_recall(reference=real, samples=fake, num_neighbours=num_neighbours)
        figures |= {
            metric_key(name, "kid"): kernel.value,
            metric_key(name, "kid_std"): kernel.std,
            metric_key(name, "precision"): shares.precision,
            metric_key(name, "recall"): shares.recall,
        }
        settings |= {
            "kid_subsets": kernel.num_subsets,
            "kid_subset_size": kernel.subset_size,
            "kid_seed": seed,
            "num_neighbours": shares.num_neighbours,
        }
    if name == INCEPTION and samples.logits is not None:
        score = inception_score(samples.logits.to(device), split_size=split_size)
        figures |= {"inception_score": score.value, "inception_score_std": score.std}
        settings |= {"inception_score_splits": score.num_splits, "inception_score_split_size": score.split_size}
    figures["num_samples"] = len(samples.pooled)
    if reference.pooled is not None:
        figures["num_reference"] = len(reference.pooled)
    provenance = {
        "samples": asdict(samples.provenance),
        "reference": asdict(reference.provenance),
        **settings,
        "left_out": [key for key in left_out if key not in figures],
    }
    return figures | {"provenance": provenance}


def check_comparable(*, samples: Provenance, reference: Provenance) -> None:
    """Refuse to compare features of different networks or of images of different sizes."""
    mend = "Compute both alike"
    if samples.features != reference.features:
        raise UserError(
            f"The reference '{reference.data}' holds features of {reference.features}, not of {samples.features}",
            f"Use --features {reference.features}, or another reference",
        )
    known = None not in (samples.weights_fingerprint, reference.weights_fingerprint)
    if known and samples.weights_fingerprint != reference.weights_fingerprint:
        raise UserError(
            f"The reference '{reference.data}' was made with other weights of {reference.features} "
            f"({reference.weights_fingerprint}) than the samples' ({samples.weights_fingerprint})",
            mend,
        )
    if (
        None not in (samples.image_size_px, reference.image_size_px)
        and samples.image_size_px != reference.image_size_px
    ):
        raise UserError(
            f"The reference '{reference.data}' is of images of {reference.image_size_px} px, the samples have "
            f"{samples.image_size_px} px",
            "Compare images of one size",
        )
    if samples.precision != reference.precision:
        raise UserError(
            f"The features of the reference '{reference.data}' were computed in {reference.precision}, the samples' "
            f"in {samples.precision}",
            mend,
        )


def check_enough(name: str, num_images: int, num_neighbours: int) -> None:
    """Refuse a set that is too small for precision and recall."""
    if num_images <= num_neighbours:
        raise UserError(
            f"'{name}' gives {num_images} images; precision and recall with {num_neighbours} neighbours need at least "
            f"{num_neighbours + 1}",
            "Give more images (figures mean something from thousands on)",
        )


def _frechet_distances(
    samples: FeatureStatistics, reference: FeatureStatistics, device: torch.device
) -> dict[str, Any]:
    """Compute FID, or whatever it is called with these features, and sFID where both have spatial moments."""
    if samples.mean.shape != reference.mean.shape:
        raise UserError(
            f"The reference '{reference.provenance.data}' has {len(reference.mean)} features, the samples have "
            f"{len(samples.mean)}",
            "Compute both alike",
        )
    figures: dict[str, Any] = {
        metric_key(samples.provenance.features): frechet_distance(
            *(each.to(device) for each in (samples.mean, samples.covariance, reference.mean, reference.covariance))
        )
    }
    spatial = (
        samples.spatial_mean,
        samples.spatial_covariance,
        reference.spatial_mean,
        reference.spatial_covariance,
    )
    if all(each is not None for each in spatial):
        figures["sfid"] = frechet_distance(*(each.to(device) for each in spatial if each is not None))
    return figures
