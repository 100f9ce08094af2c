"""Intrinsic dimension by TwoNN (Facco et al. 2017, arXiv:1803.06992), as DADApy computes it.

Table 5 and Appendix B of arXiv:2502.09509 measure latents with DADApy, so its defaults are followed: Euclidean
distances, all points, the straight-line fit through the origin, the largest tenth of the ratios left out. The tests
hold figures of DADApy 0.3.4. The number is invariant to one scale for all coordinates, not to one for each: raw latents
and latents normalized by channel differ.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eqvae.metrics.neighbours import nearest_neighbours
from eqvae.runtime.seeds import generator_for

SMALLEST_SUBSAMPLE = 20
"""Points below which a fit through the ratios says little: fewer subsamples are drawn rather than smaller ones."""


@dataclass(frozen=True, kw_only=True)
class IntrinsicDimension:
    """TwoNN's estimate, how sure it is, and what it was made from."""

    dimension: float
    """The estimate on all distinct points."""

    standard_error: float | None
    """Of `dimension`, by the method of random groups: the standard deviation of the subsamples' estimates (n - 1)
    over the square root of their number. None where the points are too few for two subsamples."""

    subsample_mean: float | None
    """Mean of the subsamples' estimates. Sparser points have farther neighbours, so where this lies far from
    `dimension` the figure depends on the scale, that is on how many points there are."""

    num_subsamples: int

    subsample_size: int
    """Points of each subsample; a remainder is left out."""

    neighbour_distance: float
    """Mean distance to the two nearest neighbours, in units of the points: the scale at which the dimension holds."""

    num_points: int
    """Distinct points."""

    num_duplicates: int
    """Points left out because an equal one comes before."""

    fraction: float
    """Share of the ratios in the fit."""


def intrinsic_dimension(
    points: Float[Tensor, "n d"], *, fraction: float = 0.9, num_subsamples: int = 10, seed: int = 0
) -> IntrinsicDimension:
    """Estimate the dimension of the manifold that points lie on.

    Of several equal points the first is kept, as after DADApy's `remove_identical_points`: a distance of zero has no
    ratio. The standard error comes from disjoint random parts of the points, within which neighbours are sought anew.
    DADApy's own error (`data_fraction=1/k`) is the same figure from k parts drawn one by one, which overlap, and over k
    where this one has k - 1. A bootstrap is no choice here: it draws equal points.

    Args:
        points: Flattened raw latents (posterior means) or any vectors, of any floating type.
        fraction: Share of the ratios to fit, the smallest, in (0, 1]. With 1 the fit is DADApy's maximum likelihood,
            since the line has no point for the largest ratio.
        num_subsamples: Parts for the standard error, at least 2; 0: none. Fewer where they would have fewer than
            `SMALLEST_SUBSAMPLE` points.
        seed: Of the partition into subsamples.

    Returns:
        The estimate; it does not depend on the order of the points, and its error depends on order and seed alone.

    Raises:
        ValueError: If there are fewer than 3 distinct points, numbers that are not finite, ratios that are all 1, or
            arguments out of range.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, but a share of the ratios lies in (0, 1]")
    if num_subsamples < 0 or num_subsamples == 1:
        raise ValueError(f"num_subsamples is {num_subsamples}; a standard error needs at least 2, 0 leaves it out")
    distances, kept = _distinct_neighbour_distances(points)
    num_points = len(kept)
    dimension = two_nn(distances, fraction)
    num_subsamples = min(num_subsamples, num_points // SMALLEST_SUBSAMPLE)
    num_subsamples = num_subsamples if num_subsamples >= 2 else 0
    subsample_size = num_points // num_subsamples if num_subsamples else 0
    order = kept[torch.randperm(num_points, generator=generator_for(seed)).to(kept.device)]
    estimates = []
    for rows in order[: num_subsamples * subsample_size].view(num_subsamples, subsample_size):
        part = points[rows]
        estimates.append(two_nn(nearest_neighbours(part, part, num_neighbours=2, skip_self=True).distances, fraction))
    spread = torch.tensor(estimates, dtype=torch.float64)
    return IntrinsicDimension(
        dimension=dimension,
        standard_error=float(spread.std()) / math.sqrt(num_subsamples) if num_subsamples else None,
        subsample_mean=float(spread.mean()) if num_subsamples else None,
        num_subsamples=num_subsamples,
        subsample_size=subsample_size,
        neighbour_distance=float(distances.mean()),
        num_points=num_points,
        num_duplicates=len(points) - num_points,
        fraction=fraction,
    )


def two_nn(distances: Float[Tensor, "n 2"], fraction: float = 0.9) -> float:
    """Fit the dimension to distances from each point to its two nearest neighbours.

    Where the density is constant over two neighbours, `mu = r2 / r1` has the distribution function `F = 1 - mu^-d`
    (Equation 5 of arXiv:1803.06992), so d is the slope of `-log(1 - F)` over `log(mu)`. With mu sorted and F = i / n,
    least squares through the origin give `d = sum(x y) / sum(x^2)` over the first `int(n * fraction)`.

    With `fraction` 1 the estimate is `(n - 1) / sum(log(mu))`, the unbiased form of maximum likelihood.
    """
    logarithms = (distances[:, 1] / distances[:, 0]).log().sort().values
    n = len(logarithms)
    num_fitted = int(n * fraction)
    x = logarithms[:num_fitted]
    if not bool((x > 0.0).any()):
        raise ValueError(
            f"the {num_fitted} smallest ratios of {n} neighbour distances show no dimension: they are all 1, as on a "
            "regular grid, or none is left"
        )
    if math.isclose(fraction, 1.0):
        return float((n - 1) / logarithms.sum())
    y = -torch.log1p(-torch.arange(1, num_fitted + 1, dtype=torch.float64, device=x.device) / n)
    return float((x * y).sum() / x.square().sum())


def _distinct_neighbour_distances(points: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m 2"], Int[Tensor, " m"]]:
    """Measure to the two nearest other points, among points of which each is kept once; say which are kept."""
    if len(points) < 3:
        raise ValueError(f"the intrinsic dimension needs at least 3 distinct points; there are {len(points)}")
    everyone = torch.arange(len(points), device=points.device)
    distances = nearest_neighbours(points, points, num_neighbours=2, skip_self=True).distances
    twins = (distances[:, 0] == 0.0).to(points.device)
    if not bool(twins.any()):
        return distances, everyone
    # Equal points have equal rows: only the points at distance zero from another need to be compared.
    rows = everyone[twins]
    groups = torch.unique(points[rows], dim=0, return_inverse=True)[1]
    first = torch.full_like(rows, len(points)).scatter_reduce(0, groups, rows, "amin")
    kept = torch.cat([everyone[~twins], first[first < len(points)]]).sort().values
    if len(kept) < 3:
        raise ValueError(f"the intrinsic dimension needs at least 3 distinct points; {len(points)} hold {len(kept)}")
    distinct = points[kept]
    return nearest_neighbours(distinct, distinct, num_neighbours=2, skip_self=True).distances, kept
