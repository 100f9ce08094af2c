"""Nearest neighbours among tens of thousands of feature vectors: fast float32 products, exact float64 answers.

All pairs are looked at by blocked matrix products, whose rounding error has a known bound. So every product gives an
interval that surely holds the pair's squared distance; what the intervals leave open is computed again by difference in
float64. Nothing then depends on how the pairs were cut into blocks, on the device, or on how far from the origin the
points lie.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_SIZE = 4096
"""Rows and columns of a block of pairs: 64 MiB for each float32 matrix of that size."""

EXTRA_CANDIDATES = 4
"""Points kept beyond the neighbours asked for; the more, the fewer queries that must be looked at twice."""

ELEMENTS_PER_CHUNK = 2**19
"""Numbers in one float64 temporary of exact arithmetic: 4 MiB, which stay in a core's cache."""

UNDERFLOW = 1e-30
"""Added to the bounds: squares of float32 numbers below 1e-19 vanish."""


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
class ScaledPoints:
    """Points moved and scaled so that float32 products of them lose as little as they can, with bounds on the loss."""

    values: Float[Tensor, "n d"]
    """float32, in [-1, 1]."""

    lower_norms: Float[Tensor, " n"]
    """`lower_norms_i + lower_norms_j - 2 <values_i, values_j>`, in float32, is never above the squared distance."""

    upper_norms: Float[Tensor, " n"]
    """The same from above."""

    unit: float
    """A power of two: a squared distance of the points is one of `values` times `unit` squared."""

    def __getitem__(self, rows: slice | Tensor) -> "ScaledPoints":
        """Take some of the points."""
        return ScaledPoints(
            values=self.values[rows],
            lower_norms=self.lower_norms[rows],
            upper_norms=self.upper_norms[rows],
            unit=self.unit,
        )

    def __len__(self) -> int:
        """Count the points."""
        return len(self.values)


@torch.no_grad()
def nearest_neighbours(
    queries: Float[Tensor, "n d"],
    points: Float[Tensor, "m d"],
    *,
    num_neighbours: int,
    skip_self: bool = False,
    block_size: int = BLOCK_SIZE,
) -> Neighbours:
    """Find the nearest points to each query, exactly.

    Needs, beside its arguments, a float32 copy of them and a few float32 matrices of `block_size` squared.
    """
    num_available = len(points) - int(skip_self)
    if num_neighbours < 1 or num_available < num_neighbours:
        own = " beside each one itself" if skip_self else ""
        raise ValueError(f"{num_neighbours} nearest neighbours need as many points{own}; there are {num_available}")
    if skip_self and len(queries) != len(points):
        raise ValueError(f"skip_self means that query i is point i, but {len(queries)} queries meet {len(points)}")
    if queries.device.type == "mps":  # it has no float64
        queries, points = queries.cpu(), points.cpu()
    scaled_queries, scaled_points = scale_points(queries, points)
    search = _Search(
        queries=queries,
        scaled_queries=scaled_queries,
        points=points,
        scaled_points=scaled_points,
        num_neighbours=num_neighbours,
        num_available=num_available,
        skip_self=skip_self,
        block_size=block_size,
    )
    squared = torch.empty((len(queries), num_neighbours), dtype=torch.float64, device=queries.device)
    indices = torch.empty_like(squared, dtype=torch.int64)
    for rows in torch.arange(len(queries), device=queries.device).split(block_size):
        squared[rows], indices[rows] = _search_candidates(search, rows)
    return Neighbours(distances=squared.sqrt_(), indices=indices)


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


def scale_points(queries: Float[Tensor, "n d"], points: Float[Tensor, "m d"]) -> tuple[ScaledPoints, ScaledPoints]:
    """Prepare two sets of vectors for `squared_distance_bounds`."""
    if len(points) == 0:
        raise ValueError("there are no points to measure distances to")
    sets = [points] if queries is points else [queries, points]
    centre = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
    for rows in _chunks(points):
        centre += rows.double().sum(0) / len(points)
    extent = 0.0
    for vectors in sets:
        for rows in _chunks(vectors):
            largest = float((rows.double() - centre).abs().amax()) if rows.numel() else 0.0
            if not largest < LARGEST:
                raise ValueError("feature vectors must be finite; there are NaN, infinite or huge numbers among them")
            extent = max(extent, largest)
    # A power of two scales without rounding.
    unit = 2.0 ** float(torch.tensor(extent, dtype=torch.float64).log2().ceil()) if extent > 0.0 else 1.0
    scaled = [_scale(vectors, centre, unit) for vectors in sets]
    return scaled[0], scaled[-1]


def squared_distance_bounds(
    queries: ScaledPoints, points: ScaledPoints
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Bound the squared distances of all pairs by one float32 matrix product."""
    with _full_float32(queries.values.device):
        products = torch.mm(queries.values, points.values.T).mul_(-2.0)
    upper = products + queries.upper_norms[:, None]
    upper += points.upper_norms
    products += queries.lower_norms[:, None]
    products += points.lower_norms
    return products, upper


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The arguments of `nearest_neighbours`, prepared."""

    queries: Float[Tensor, "n d"]
    scaled_queries: ScaledPoints
    points: Float[Tensor, "m d"]
    scaled_points: ScaledPoints
    num_neighbours: int
    num_available: int
    """Points that a query may choose from."""
    skip_self: bool
    block_size: int

    def lower_bounds(self, rows: Int[Tensor, " b"]) -> Iterator[tuple[int, Float[Tensor, "b w"]]]:
        """Bound squared distances of some queries to all points from below: blocks, each with its first point."""
        some = self.scaled_queries[rows]
        for start in range(0, len(self.points), self.block_size):
            block = self.scaled_points[start : start + self.block_size]
            lower, _ = squared_distance_bounds(some, block)
            if self.skip_self:
                own = ((rows >= start) & (rows < start + len(block))).nonzero()[:, 0]
                lower[own, rows[own] - start] = float("inf")
            yield start, lower


def _search_candidates(search: _Search, rows: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Find the neighbours of some queries, squared distances and indices: the points of lowest bounds hold them."""
    num_candidates = min(search.num_neighbours + EXTRA_CANDIDATES, search.num_available)
    lowest = torch.empty((len(rows), 0), device=rows.device)
    candidates = torch.empty((len(rows), 0), dtype=torch.int64, device=rows.device)
    for start, lower in search.lower_bounds(rows):
        values, columns = lower.topk(min(num_candidates, lower.shape[1]), dim=1, largest=False, sorted=False)
        lowest, candidates = torch.cat([lowest, values], 1), torch.cat([candidates, columns + start], 1)
        if lowest.shape[1] > num_candidates:
            lowest, kept = lowest.topk(num_candidates, dim=1, largest=False, sorted=False)
            candidates = candidates.gather(1, kept)
    pairs = rows.repeat_interleave(num_candidates), candidates.flatten()
    squared = squared_distances(search.queries, search.points, *pairs).view(len(rows), num_candidates)
    squared, indices = _first_of_each_row(squared, candidates, search.num_neighbours)
    if num_candidates == search.num_available:
        return squared, indices
    # No other point is nearer than the last candidate's lower bound, nor is any nearer than 0.
    worst, cutoff = squared[:, -1], lowest.amax(1).double() * search.scaled_points.unit**2
    unsettled = ((worst >= cutoff) & (worst > 0.0)).nonzero()[:, 0]
    for some in unsettled.split(max(1, search.block_size // 16)) if len(unsettled) else ():
        squared[some], indices[some] = _search_within(search, rows[some], worst[some])
    return squared, indices


def _search_within(
    search: _Search, rows: Int[Tensor, " b"], squared_radii: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Find the neighbours of queries whose candidates were too close to call, from all points within a radius."""
    scaled_radii = round_up(squared_radii / search.scaled_points.unit**2)
    best = torch.full((len(rows), search.num_neighbours), float("inf"), dtype=torch.float64, device=rows.device)
    indices = torch.full_like(best, -1, dtype=torch.int64)
    for start, lower in search.lower_bounds(rows):
        possible = lower <= scaled_radii[:, None]
        places, columns = possible.nonzero(as_tuple=True)
        # Queries differ in how many points they have left: those of each are packed to the left of its row.
        order = possible.cumsum(1)[places, columns] - 1
        squared = best.new_full((len(rows), int(possible.sum(1).amax())), float("inf"))
        named = torch.full_like(squared, -1, dtype=torch.int64)
        squared[places, order] = squared_distances(search.queries, search.points, rows[places], columns + start)
        named[places, order] = columns + start
        best, indices = torch.cat([best, squared], 1), torch.cat([indices, named], 1)
        best, indices = _first_of_each_row(best, indices, search.num_neighbours)
    return best, indices


def _first_of_each_row(
    squared: Float[Tensor, "b c"], indices: Int[Tensor, "b c"], num_kept: int
) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Sort each row by distance, then by index, and keep the first of each."""
    indices, order = indices.sort(dim=1)
    squared, by_distance = squared.gather(1, order).sort(dim=1, stable=True)
    return squared[:, :num_kept].contiguous(), indices.gather(1, by_distance)[:, :num_kept].contiguous()


def _scale(vectors: Float[Tensor, "n d"], centre: Float[Tensor, " d"], unit: float) -> ScaledPoints:
    """Move, scale and round vectors, and compute their norms with the bounds on what products of them lose."""
    values = torch.empty(vectors.shape, dtype=torch.float32, device=vectors.device)
    squared_norms = torch.empty(len(vectors), dtype=torch.float64, device=vectors.device)
    start = 0
    for rows in _chunks(vectors):
        moved = (rows.double() - centre) / unit
        values[start : start + len(rows)] = moved
        squared_norms[start : start + len(rows)] = moved.square_().sum(1)
        start += len(rows)
    # A float32 product of d terms errs by at most d / 2^24 of |x||y| in whatever order it is added (Higham, Accuracy
    # and Stability of Numerical Algorithms, Section 3.1), and 2|x||y| <= |x|^2 + |y|^2; 16 more roundings of that size
    # cover the coordinates, the norms and their sums.
    loss = 1.1 * (vectors.shape[1] + 16) * 2.0**-24
    return ScaledPoints(
        values=values,
        lower_norms=(squared_norms * (1.0 - loss) - UNDERFLOW).float(),
        upper_norms=(squared_norms * (1.0 + loss) + UNDERFLOW).float(),
        unit=unit,
    )


def round_up(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round float64 to float32 numbers that are not lower."""
    return torch.nextafter(values.float(), torch.tensor(float("inf"), device=values.device))


def _chunks(vectors: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "b d"]]:
    """Cut vectors into parts that may be turned to float64."""
    return iter(vectors.split(max(1, ELEMENTS_PER_CHUNK // max(1, vectors.shape[1]))))


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32, though the process may have asked for bfloat16 or TF32."""
    wanted = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(wanted)
