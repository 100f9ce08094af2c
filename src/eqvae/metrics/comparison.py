"""Two sets of images compared by their features: every figure of a score, and where each comes from.

The kernel distance (Binkowski et al. 2018, arXiv:1801.01401) is the KID with Inception's features. Unlike a Frechet
distance it is unbiased: few images give the same figure as many, on average, only less surely. The Inception Score
(Salimans et al. 2016, arXiv:1606.03498) is taken over splits as ADM's evaluator does.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.errors import UserError
from eqvae.images.sources import counted
from eqvae.metrics.adm_half import adm_half_precision_recall
from eqvae.metrics.frechet import frechet_distance
from eqvae.metrics.neighbours import precision_recall
from eqvae.metrics.statistics import FeatureStatistics, Provenance
from eqvae.networks.features import INCEPTION, metric_key
from eqvae.runtime.seeds import generator_for


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
    adm_half: bool = False,
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
        if adm_half:
            rounded = adm_half_precision_recall(reference=real, samples=fake, num_neighbours=num_neighbours)
            figures |= {
                f"{metric_key(name, 'precision')}_adm_half": rounded.precision,
                f"{metric_key(name, 'recall')}_adm_half": rounded.recall,
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
    if samples.num_channels != reference.num_channels:
        raise UserError(
            f"The reference '{reference.data}' is of images of {counted(reference.num_channels, 'channel')}, the "
            f"samples have {samples.num_channels}",
            "Compare images of one kind",
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
    spatial = (samples.spatial_mean, samples.spatial_covariance, reference.spatial_mean, reference.spatial_covariance)
    if all(each is not None for each in spatial):
        figures["sfid"] = frechet_distance(*(each.to(device) for each in spatial if each is not None))
    return figures


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """The squared maximum mean discrepancy over random subsets."""

    value: float
    """Mean over subsets; slightly negative where the sets are alike."""

    std: float
    """Standard deviation over subsets (not of their mean), divided by their number as torch-fidelity does."""

    num_subsets: int
    """1 where a subset is all there is."""

    subset_size: int
    """Images of each set in a subset: as asked for, or as many as the smaller set has."""


def kernel_distance(
    *,
    reference: Float[Tensor, "n d"],
    samples: Float[Tensor, "m d"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Compare two sets of feature vectors; computed in float64 on their device.

    100 subsets of 1000 are torch-fidelity's; smaller sets give subsets of what they have. The draws depend on the
    seed, the subset's index and the sets' sizes alone.
    """
    for name, features in {"reference": reference, "samples": samples}.items():
        if len(features) < 2:
            raise ValueError(f"a kernel distance needs at least 2 images in each set; the {name} have {len(features)}")
        if not all(math.isfinite(float(extreme)) for extreme in features.aminmax()):
            raise ValueError(f"the features of the {name} must be finite; there are NaN or infinite numbers among them")
    subset_size = min(subset_size, len(reference), len(samples))
    if subset_size == len(reference) == len(samples):
        num_subsets = 1
    values = torch.empty(num_subsets, dtype=torch.float64)
    for index in range(num_subsets):
        generator = generator_for(seed, index)
        real, fake = (
            features[torch.randperm(len(features), generator=generator)[:subset_size].to(features.device)]
            for features in (reference, samples)
        )
        values[index] = squared_mmd(real, fake)
    return KernelDistance(
        value=float(values.mean()),
        std=float(values.std(correction=0)),
        num_subsets=num_subsets,
        subset_size=subset_size,
    )


def squared_mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Estimate the squared maximum mean discrepancy without bias, under the kernel `k(x, y) = (<x, y> / d + 1)^3`."""
    if x.device.type == "mps":  # it has no float64
        x, y = x.cpu(), y.cpu()
    x, y = x.double(), y.double()
    return float(_mean_within(x) + _mean_within(y) - 2.0 * _kernel(x, y).mean())


def _mean_within(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    kernel = _kernel(x, x)
    return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))


def _kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """How sure a classifier is of each image, and how many classes it sees in all of them."""

    value: float
    """Mean over splits, 1 ... the number of classes."""

    std: float
    """Standard deviation over splits, divided by their number; 0 for a single one."""

    num_splits: int

    split_size: int
    """Images in a split; the last may have fewer, and counts as much as the others."""


def inception_score(logits: Float[Tensor, "n c"], *, split_size: int = 5000) -> InceptionScore:
    """Compute `exp(E_x KL(p(y|x) || p(y)))` for each split of images in their order, and the mean over splits.

    ADM (openai/guided-diffusion, evaluations/evaluator.py) feeds the softmax of logits without the last layer's bias,
    over all 1008 outputs; torch-fidelity calls these `logits_unbiased`.
    Splits of 5000 are ADM's: the score grows with their size until every class is seen often.
    """
    if len(logits) == 0 or split_size < 1:
        raise ValueError(f"an Inception Score needs an image in each split: {len(logits)} images by {split_size}")
    if not all(math.isfinite(float(extreme)) for extreme in logits.aminmax()):
        raise ValueError("logits must be finite; there are NaN or infinite numbers among them")
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    scores = torch.stack([_score(split) for split in logits.split(split_size)])
    return InceptionScore(
        value=float(scores.mean()),
        std=float(scores.std(correction=0)),
        num_splits=len(scores),
        split_size=min(split_size, len(logits)),
    )


def _score(logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """Compute the score of one split by the difference of entropies, which classes of probability 0 do not upset."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    marginal = p.mean(0)
    return ((p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()).exp()
