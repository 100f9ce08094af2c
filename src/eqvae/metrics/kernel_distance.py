"""Kernel distance between two sets of feature vectors (Binkowski et al. 2018, arXiv:1801.01401).

With Inception's features it is the KID. Unlike a Frechet distance it is unbiased: few images give the same figure as
many, on average, only less surely.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.runtime.seeds import generator_for


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

    Args:
        reference: Features of real images.
        samples: Features of generated images.
        num_subsets: Times that a subset of each set is drawn, without replacement within one; 100 as torch-fidelity.
        subset_size: Its size; 1000 as torch-fidelity. Smaller sets give subsets of what they have.
        seed: Of the draws, which depend on the subset's index and the sets' sizes alone.

    Returns:
        Mean and standard deviation over subsets.

    Raises:
        ValueError: If a set has fewer than two vectors, or numbers that are not finite.
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
