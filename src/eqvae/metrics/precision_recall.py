"""Improved precision and recall of Kynkaanniemi et al. 2019 (arXiv:1904.06991), as ADM's evaluator defines them.

Both sets are taken for the union of balls around their points, each as wide as the way to the point's third nearest
neighbour in its own set. Precision is the share of samples inside the reference's balls, recall the share of reference
images inside the samples'.

ADM (openai/guided-diffusion, evaluations/evaluator.py) counts a point as its own neighbour of order zero, so its k = 3
means three others; copies of a point count among them. A point on a ball's surface is inside (`<=`). Its `eps` of 1e-5
enters the realism score alone, which is not reported. Its distances come from float16 products where those are finite;
ours are exact, so figures can differ from its own where points lie next to a surface.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eqvae.metrics.neighbours import (
    BLOCK_SIZE,
    ScaledPoints,
    nearest_neighbours,
    round_up,
    scale_points,
    squared_distance_bounds,
    squared_distances,
)


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """How much of the samples is like the reference, and how much of the reference the samples reach."""

    precision: float
    """The share of samples within the reference's balls, 0 ... 1."""

    recall: float
    """The share of reference images within the samples' balls, 0 ... 1."""

    num_neighbours: int
    """The neighbour whose distance is a ball's radius."""


@dataclass(frozen=True, kw_only=True)
class _Balls:
    """Points of one set with the balls around them."""

    features: Float[Tensor, "n d"]
    scaled: ScaledPoints
    squared_radii: Float[Tensor, " n"]
    """float64, in the features' own units."""


@torch.no_grad()
def precision_recall(
    *,
    reference: Float[Tensor, "n d"],
    samples: Float[Tensor, "m d"],
    num_neighbours: int = 3,
    block_size: int = BLOCK_SIZE,
) -> PrecisionRecall:
    """Compare two sets of feature vectors; computed on their device.

    Which points lie inside is settled exactly (see `eqvae.metrics.neighbours`), so the result does not depend on
    the block size. Needs, beside the features, a float32 copy of both and a few matrices of `block_size` squared.

    Args:
        reference: Features of real images.
        samples: Features of generated images; as many, by ADM's protocol. Named, because the two are not alike.
        num_neighbours: The neighbour that gives the radius: 3 by ADM's protocol.
        block_size: Points of each set that are compared at a time.

    Returns:
        Precision and recall.

    Raises:
        ValueError: If a set has fewer than `num_neighbours + 1` vectors, or numbers that are not finite.
    """
    for name, features in {"reference": reference, "samples": samples}.items():
        if len(features) < num_neighbours + 1:
            raise ValueError(
                f"precision and recall with {num_neighbours} neighbours need at least {num_neighbours + 1} images in "
                f"each set; there are {len(features)} in the {name}"
            )
    if samples.device.type == "mps":  # it has no float64
        reference, samples = reference.cpu(), samples.cpu()
    radii = [_squared_radii(features, num_neighbours, block_size) for features in (reference, samples)]
    scaled_samples, scaled_reference = scale_points(samples, reference)
    real = _Balls(features=reference, scaled=scaled_reference, squared_radii=radii[0])
    fake = _Balls(features=samples, scaled=scaled_samples, squared_radii=radii[1])
    fake_inside, real_inside = _members(fake, real, block_size)
    return PrecisionRecall(
        precision=float(fake_inside.double().mean()),
        recall=float(real_inside.double().mean()),
        num_neighbours=num_neighbours,
    )


def _squared_radii(features: Float[Tensor, "n d"], num_neighbours: int, block_size: int) -> Float[Tensor, " n"]:
    """Compute each point's squared distance to its k-th neighbour, by the arithmetic that members are tested by."""
    neighbours = nearest_neighbours(
        features, features, num_neighbours=num_neighbours, skip_self=True, block_size=block_size
    )
    own = torch.arange(len(features), device=features.device)
    return squared_distances(features, features, own, neighbours.indices[:, -1])


def _members(a: _Balls, b: _Balls, block_size: int) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " m"]]:
    """Tell which points of a lie in balls of b, and which of b in balls of a; each block of pairs serves both."""
    a_inside = torch.zeros(len(a.features), dtype=torch.bool, device=a.features.device)
    b_inside = torch.zeros(len(b.features), dtype=torch.bool, device=b.features.device)
    for row in range(0, len(a_inside), block_size):
        rows = slice(row, row + block_size)
        for column in range(0, len(b_inside), block_size):
            columns = slice(column, column + block_size)
            lower, upper = squared_distance_bounds(a.scaled[rows], b.scaled[columns])
            _mark(a_inside, a, b, lower, upper, (row, column))
            _mark(b_inside, b, a, lower.T, upper.T, (column, row))
    return a_inside, b_inside


def _mark(
    inside: Bool[Tensor, " n"],
    points: _Balls,
    balls: _Balls,
    lower: Float[Tensor, "b w"],
    upper: Float[Tensor, "b w"],
    corner: tuple[int, int],
) -> None:
    """Mark the points of one block that lie in one of its balls."""
    first, first_ball = corner
    squared_radii = balls.squared_radii[first_ball : first_ball + lower.shape[1]]
    scaled = squared_radii / balls.scaled.unit**2
    marked = inside[first : first + lower.shape[0]]  # a view
    marked |= (upper <= -round_up(-scaled)).any(1)
    open_pairs = (lower <= round_up(scaled)) & ~marked[:, None]

    def settle(rows: Tensor, columns: Tensor) -> None:
        squared = squared_distances(points.features, balls.features, rows + first, columns + first_ball)
        marked[rows[squared <= squared_radii[columns]]] = True

    # One pair of each point first: where many are open, as among copies, most points are settled by it.
    open_rows = open_pairs.any(1).nonzero()[:, 0]
    open_pairs = open_pairs[open_rows]
    settle(open_rows, open_pairs.byte().argmax(1))
    places, columns = (open_pairs & ~marked[open_rows, None]).nonzero(as_tuple=True)
    settle(open_rows[places], columns)
