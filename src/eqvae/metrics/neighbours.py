"""Nearest neighbours among tens of thousands of feature vectors, and the precision and recall that they define.

Distances of all pairs come from blocked float64 products. Where these are too close to call, among copies and ties,
they are computed again by difference, so that nothing depends on how the pairs were cut into blocks, on the device, or
on how far from the origin the points lie.

Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991) are as ADM's evaluator defines them: both
sets are taken for the union of balls around their points, each as wide as the way to the point's third nearest
neighbour in its own set. Precision is the share of samples inside the reference's balls, recall the share of reference
images inside the samples'. ADM (openai/guided-diffusion, evaluations/evaluator.py) counts a point as its own neighbour
of order zero, so its k = 3 means three others; copies of a point count among them. A point on a ball's surface is
inside (`<=`). Its `eps` of 1e-5 enters the realism score alone, which is not reported. Its distances come from float16
products where those are finite; ours are exact, so figures can differ from its own where points lie next to a surface.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_SIZE = 2048
"""Rows and columns of a block of pairs: 32 MiB for each float64 matrix of that size."""

EXTRA_CANDIDATES = 4
"""Points kept beyond the neighbours asked for; the more, the fewer queries that must be looked at twice."""

ELEMENTS_PER_CHUNK = 2**19
"""Numbers in one float64 temporary of exact arithmetic: 4 MiB, which stay in a core's cache."""

LARGEST = 1e150
"""Coordinates beyond it have squares that float64 does not hold."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The nearest points to each query."""

    distances: Float[Tensor, "n k"]
    """Euclidean, float64, ascending."""

    indices: Int[Tensor, "n k"]
    """Into the points, int64; of points at equal distance the lower index comes first. Only where more points than
    were asked for lie at distance 0 is it left open which of them are named."""


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """How much of the samples is like the reference, and how much of the reference the samples reach."""

    precision: float
    """The share of samples within the reference's balls, 0 ... 1."""

    recall: float
    """The share of reference images within the samples' balls, 0 ... 1."""

    num_neighbours: int
    """The neighbour whose distance is a ball's radius."""


@torch.no_grad()
def nearest_neighbours(
    queries: Float[Tensor, "n d"],
    points: Float[Tensor, "m d"],
    *,
    num_neighbours: int,
    skip_self: bool = False,
    block_size: int = BLOCK_SIZE,
) -> Neighbours:
    """Find the nearest points to each query, exactly; needs, beside its arguments, a few matrices of a block's size."""
    num_available = len(points) - int(skip_self)
    if num_neighbours < 1 or num_available < num_neighbours:
        own = " beside each one itself" if skip_self else ""
        raise ValueError(f"{num_neighbours} nearest neighbours need as many points{own}; there are {num_available}")
    if skip_self and len(queries) != len(points):
        raise ValueError(f"skip_self means that query i is point i, but {len(queries)} queries meet {len(points)}")
    if queries.device.type == "mps":  # it has no float64
        queries, points = queries.cpu(), points.cpu()
    pairs = _Pairs.of(queries, points)
    squared = torch.empty((len(queries), num_neighbours), dtype=torch.float64, device=queries.device)
    indices = torch.empty_like(squared, dtype=torch.int64)
    for rows in torch.arange(len(queries), device=queries.device).split(block_size):
        squared[rows], indices[rows] = _nearest(pairs, rows, num_neighbours, skip_self, block_size)
    return Neighbours(distances=squared.sqrt_(), indices=indices)


@torch.no_grad()
def precision_recall(
    *,
    reference: Float[Tensor, "n d"],
    samples: Float[Tensor, "m d"],
    num_neighbours: int = 3,
    block_size: int = BLOCK_SIZE,
) -> PrecisionRecall:
    """Compare two sets of feature vectors, as many of each by ADM's protocol; computed on their device."""
    for name, features in {"reference": reference, "samples": samples}.items():
        if len(features) < num_neighbours + 1:
            raise ValueError(
                f"precision and recall with {num_neighbours} neighbours need at least {num_neighbours + 1} images in "
                f"each set; there are {len(features)} in the {name}"
            )
    if samples.device.type == "mps":  # it has no float64
        reference, samples = reference.cpu(), samples.cpu()
    real_radii, fake_radii = (_squared_radii(each, num_neighbours, block_size) for each in (reference, samples))
    pairs, device = _Pairs.of(samples, reference), samples.device
    fake_inside, real_inside = (
        torch.zeros(len(each), dtype=torch.bool, device=device) for each in (samples, reference)
    )
    for rows in torch.arange(len(samples), device=device).split(block_size):
        for columns, squared in pairs.blocks(rows, block_size):
            fake_inside[rows] |= _inside(squared, real_radii[columns], pairs, rows, columns)
            real_inside[columns] |= _inside(squared.T, fake_radii[rows], pairs.swapped, columns, rows)
    return PrecisionRecall(
        precision=float(fake_inside.double().mean()),
        recall=float(real_inside.double().mean()),
        num_neighbours=num_neighbours,
    )


def squared_distances(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], a_indices: Int[Tensor, " p"], b_indices: Int[Tensor, " p"]
) -> Float[Tensor, " p"]:
    """Compute the squared distance of given pairs in float64, by difference.

    A pair gives the same bits whichever other pairs are computed beside it, whichever of the two comes first and on
    whatever device: the squares are added up in a fixed tree, where `sum` may choose another order for another shape.
    """
    num_pairs = max(1, ELEMENTS_PER_CHUNK // max(1, a.shape[1]))
    results = [a.new_empty(0).double()]
    for rows, columns in zip(a_indices.split(num_pairs), b_indices.split(num_pairs), strict=True):
        terms = (a[rows].double() - b[columns].double()).square_()
        while terms.shape[1] > 1:
            half, odd = divmod(terms.shape[1], 2)
            terms[:, :half] += terms[:, half : 2 * half]
            if odd:
                terms[:, 0] += terms[:, -1]
            terms = terms[:, :half]
        results.append(terms.sum(1))  # of one number, or of none
    return torch.cat(results)


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """All pairs of two sets of vectors, and how much their squared distances by float64 products may err."""

    queries: Float[Tensor, "n d"]
    points: Float[Tensor, "m d"]
    centre: Float[Tensor, " d"]
    """Taken off before products, which lose the digits that all vectors have in common."""
    slack: float

    @classmethod
    def of(cls, queries: Float[Tensor, "n d"], points: Float[Tensor, "m d"]) -> "_Pairs":
        """Find the centre and the largest norm, which bounds the error."""
        if len(points) == 0:
            raise ValueError("there are no points to measure distances to")
        centre = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
        for rows in points.split(BLOCK_SIZE):
            centre += rows.double().sum(0) / len(points)
        largest = 0.0
        for rows in (*points.split(BLOCK_SIZE), *queries.split(BLOCK_SIZE)):
            moved = rows.double() - centre
            if moved.numel() and not float(moved.abs().amax()) < LARGEST:
                raise ValueError("feature vectors must be finite; there are NaN, infinite or huge numbers among them")
            largest = max([largest, *moved.square_().sum(1).tolist()])
        # A product of d terms errs by at most d / 2^53 of |x||y| in whatever order it is added (Higham, Accuracy and
        # Stability of Numerical Algorithms, Section 3.1); so do the norms, and 16 more roundings cover their sum.
        slack = 8.0 * (points.shape[1] + 16) * 2.0**-53 * largest
        return cls(queries=queries, points=points, centre=centre, slack=slack)

    @property
    def swapped(self) -> "_Pairs":
        """The same pairs, the points asking."""
        return _Pairs(queries=self.points, points=self.queries, centre=self.centre, slack=self.slack)

    def blocks(
        self, rows: Int[Tensor, " b"], block_size: int
    ) -> Iterator[tuple[Int[Tensor, " w"], Float[Tensor, "b w"]]]:
        """Compute the squared distances, within the slack, of some queries to all points, block by block."""
        a = self.queries[rows].double() - self.centre
        for columns in torch.arange(len(self.points), device=self.points.device).split(block_size):
            b = self.points[columns].double() - self.centre
            squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2.0)
            yield columns, squared.add_(a.square().sum(1)[:, None])

    def exact(self, rows: Int[Tensor, " p"], columns: Int[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Compute the squared distances of given pairs by difference."""
        return squared_distances(self.queries, self.points, rows, columns)


def _nearest(
    pairs: _Pairs, rows: Int[Tensor, " b"], num_neighbours: int, skip_self: bool, block_size: int
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Find the neighbours of some queries, squared distances and indices: a few candidates hold them, save in ties."""

    def blocks(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for columns, squared in pairs.blocks(rows, block_size):
            yield columns, squared.masked_fill_(rows[:, None] == columns, float("inf")) if skip_self else squared

    num_available = len(pairs.points) - int(skip_self)
    num_candidates = min(num_neighbours + EXTRA_CANDIDATES, num_available)
    lowest, candidates = pairs.centre.new_empty(len(rows), 0), rows.new_empty(len(rows), 0)
    for columns, squared in blocks(rows):
        values, places = squared.topk(min(num_candidates, len(columns)), dim=1, largest=False)
        lowest, candidates = torch.cat([lowest, values], 1), torch.cat([candidates, columns[places]], 1)
        lowest, kept = lowest.topk(min(num_candidates, lowest.shape[1]), dim=1, largest=False)
        candidates = candidates.gather(1, kept)
    candidates = candidates.sort(dim=1).values  # of equal distances, the lower index comes first
    exact = pairs.exact(rows.repeat_interleave(num_candidates), candidates.flatten()).view(len(rows), num_candidates)
    best, order = (each[:, :num_neighbours] for each in exact.sort(dim=1, stable=True))
    best, indices = best.contiguous(), candidates.gather(1, order)
    # A point that was left out may be as near as the last candidate, less the slack; but none is nearer than 0.
    is_open = (best[:, -1] >= lowest[:, -1] - pairs.slack) & (best[:, -1] > 0.0) & (num_candidates < num_available)
    if is_open.any():
        rows, radii = rows[is_open], best[is_open, -1:]
        near = [((squared <= radii + pairs.slack).nonzero(), columns) for columns, squared in blocks(rows)]
        owner = torch.cat([found[:, 0] for found, _ in near])
        points = torch.cat([columns[found[:, 1]] for found, columns in near])
        exact = pairs.exact(rows[owner], points)
        order = exact.argsort(stable=True)
        order = order[owner[order].argsort(stable=True)]  # by query, then by distance, then by index
        first = torch.searchsorted(owner[order], torch.arange(len(rows), device=rows.device))
        chosen = order[first[:, None] + torch.arange(num_neighbours, device=rows.device)]
        best[is_open], indices[is_open] = exact[chosen], points[chosen]
    return best, indices


def _squared_radii(features: Float[Tensor, "n d"], num_neighbours: int, block_size: int) -> Float[Tensor, " n"]:
    """Compute each point's squared distance to its k-th neighbour, by the arithmetic that members are tested by."""
    neighbours = nearest_neighbours(
        features, features, num_neighbours=num_neighbours, skip_self=True, block_size=block_size
    )
    own = torch.arange(len(features), device=features.device)
    return squared_distances(features, features, own, neighbours.indices[:, -1])


def _inside(
    squared: Float[Tensor, "b w"],
    squared_radii: Float[Tensor, " w"],
    pairs: _Pairs,
    rows: Int[Tensor, " b"],
    columns: Int[Tensor, " w"],
) -> Bool[Tensor, " b"]:
    """Tell which queries lie in one of the balls around some points."""
    inside = (squared <= squared_radii - pairs.slack).any(1)
    is_open = (squared <= squared_radii + pairs.slack) & ~inside[:, None]

    def settle(places: Tensor, balls: Tensor) -> None:
        exact = pairs.exact(rows[places], columns[balls])
        inside[places[exact <= squared_radii[balls]]] = True

    # One pair of each point first: where many are open, as among copies, most points are settled by it.
    places = is_open.any(1).nonzero()[:, 0]
    settle(places, is_open[places].byte().argmax(1))
    settle(*(is_open & ~inside[:, None]).nonzero(as_tuple=True))
    return inside
