"""Nearest neighbours: against brute force, on clouds that float32 products get wrong."""

import numpy as np
import pytest
import torch

from eqvae.metrics import neighbours as module
from eqvae.metrics.neighbours import nearest_neighbours, squared_distances


def cloud(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def brute_force(queries, points, num_neighbours, skip_self=False):
    """All pairs in float64 by difference; of equal distances the lower index first."""
    differences = queries.double().numpy()[:, None] - points.double().numpy()[None]
    distances = np.sqrt((differences**2).sum(-1))
    if skip_self:
        np.fill_diagonal(distances, np.inf)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :num_neighbours]
    return np.take_along_axis(distances, indices, 1), indices


def assert_equal(found, expected):
    distances, indices = expected
    assert found.distances.dtype == torch.float64 and found.indices.dtype == torch.int64
    assert np.allclose(found.distances.numpy(), distances, rtol=1e-13, atol=0.0)
    assert np.array_equal(found.indices.numpy(), indices)


@pytest.mark.parametrize("block_size", [13, 64, 10_000])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_neighbours_are_those_of_brute_force(block_size, offset):
    points, queries = cloud(150, 100) + offset, cloud(60, 100, seed=1) + offset
    found = nearest_neighbours(queries, points, num_neighbours=4, block_size=block_size)
    assert_equal(found, brute_force(queries, points, 4))


def test_blocks_of_a_single_pair():
    points, queries = cloud(12, 3), cloud(5, 3, seed=1)
    for each, skip_self in ((queries, False), (points, True)):
        found = nearest_neighbours(each, points, num_neighbours=2, skip_self=skip_self, block_size=1)
        assert_equal(found, brute_force(each, points, 2, skip_self))


@pytest.mark.parametrize("block_size", [11, 64, 10_000])
def test_a_point_is_not_its_own_neighbour_but_its_copies_are(block_size):
    points = cloud(80, 5)
    points = torch.cat([points, points[:20], points[:20]])
    found = nearest_neighbours(points, points, num_neighbours=3, skip_self=True, block_size=block_size)
    assert_equal(found, brute_force(points, points, 3, skip_self=True))
    assert found.distances[0, :2].tolist() == [0.0, 0.0] and found.indices[0, :2].tolist() == [80, 100]
    assert (found.distances[:20, 2] > 0.0).all()


@pytest.mark.parametrize("block_size", [32, 10_000])
def test_tight_clusters_far_apart_are_resolved(block_size):
    """Within a cluster, a float32 product of centred points has no digit of the squared distance left."""
    centres = 100.0 * cloud(4, 30, dtype=torch.float64)
    points = (centres[:, None] + 1e-6 * cloud(4, 40, 30, seed=1, dtype=torch.float64)).flatten(0, 1)
    found = nearest_neighbours(points, points, num_neighbours=2, skip_self=True, block_size=block_size)
    assert_equal(found, brute_force(points, points, 2, skip_self=True))


def test_many_ties_are_named_by_the_lowest_index():
    grid = torch.cartesian_prod(*[torch.arange(5.0)] * 3)
    found = nearest_neighbours(grid, grid, num_neighbours=4, skip_self=True, block_size=50)
    assert_equal(found, brute_force(grid, grid, 4, skip_self=True))


def test_more_copies_than_candidates():
    points = torch.ones(100, 3)
    found = nearest_neighbours(points, points, num_neighbours=3, skip_self=True)
    assert (found.distances == 0.0).all()
    assert (found.indices != torch.arange(100)[:, None]).all()


def test_results_keep_every_bit_whatever_the_block_size():
    points = cloud(300, 40) ** 3
    first, *others = [
        nearest_neighbours(points, points, num_neighbours=3, skip_self=True, block_size=size) for size in (11, 100, 999)
    ]
    for other in others:
        assert torch.equal(first.distances, other.distances) and torch.equal(first.indices, other.indices)


def test_a_lower_precision_of_products_is_not_used():
    points = cloud(200, 64) + 5.0
    expected = nearest_neighbours(points, points, num_neighbours=2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_neighbours(points, points, num_neighbours=2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.distances, expected.distances)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15])
def test_the_slack_holds_the_error_of_products(scale):
    points = scale * torch.cat([cloud(60, 300), 1e-3 * cloud(60, 300, seed=1) + 2.0])
    pairs, everyone = module._Pairs.of(points, points), torch.arange(120)
    squared = torch.cat([block for _, block in pairs.blocks(everyone, 50)], 1)
    exact = squared_distances(points, points, everyone.repeat_interleave(120), everyone.repeat(120)).view(120, 120)
    assert (squared - exact).abs().max() <= pairs.slack < 1e-9 * exact.max()


def test_a_pair_has_the_same_bits_in_any_company(monkeypatch):
    a, b = cloud(50, 129), cloud(50, 129, seed=1)
    order = torch.arange(50)
    squared = squared_distances(a, b, order, order)
    assert torch.equal(squared, squared_distances(b, a, order, order))
    monkeypatch.setattr(module, "ELEMENTS_PER_CHUNK", 300)
    assert torch.equal(squared, squared_distances(a, b, order, order))
    assert torch.equal(squared[7:8], squared_distances(a, b, order[7:8], order[7:8]))
    assert torch.allclose(squared, (a.double() - b.double()).square().sum(1), rtol=1e-14)


def test_few_points_and_numbers_that_are_not_finite_are_refused():
    points = cloud(3, 2)
    assert nearest_neighbours(points, points, num_neighbours=2, skip_self=True).indices.shape == (3, 2)
    assert nearest_neighbours(points[:0], points, num_neighbours=2).indices.shape == (0, 2)
    with pytest.raises(ValueError, match="there are 2"):
        nearest_neighbours(points, points, num_neighbours=3, skip_self=True)
    with pytest.raises(ValueError, match="there are 0"):
        nearest_neighbours(points, points[:0], num_neighbours=1)
    with pytest.raises(ValueError, match="query i is point i"):
        nearest_neighbours(points[:2], points, num_neighbours=1, skip_self=True)
    for bad in (float("nan"), float("inf"), -float("inf"), 1e200):
        broken = points.double()
        broken[1, 1] = bad
        for queries, among in ((broken, points), (points, broken), (broken, broken)):
            with pytest.raises(ValueError, match="must be finite"):
                nearest_neighbours(queries, among, num_neighbours=1)
