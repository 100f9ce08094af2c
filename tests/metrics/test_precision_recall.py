"""Precision and recall: closed forms, and a plain version of ADM's definition on all pairs at once."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from eqvae.metrics.neighbours import PrecisionRecall, precision_recall

BLOCK_SIZES = (29, 64, 100_000)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_adm_s_definition(reference, samples, k=3):
    """Squared distances in float64; the k-th smallest in a point's own row, in which the point itself is the 0-th."""

    def squared_distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    reference, samples = reference.double().numpy(), samples.double().numpy()
    radii = [np.sort(squared_distances(each, each), axis=1)[:, k] for each in (reference, samples)]
    between = squared_distances(reference, samples)
    precision = (between <= radii[0][:, None]).any(0).mean()
    recall = (between <= radii[1][None]).any(1).mean()
    return PrecisionRecall(precision=float(precision), recall=float(recall), num_neighbours=k)


def assert_equal_for_any_block_size(reference, samples, k=3):
    expected = by_adm_s_definition(reference, samples, k)
    for size in BLOCK_SIZES:
        options = {"num_neighbours": k, "block_size": size}
        assert precision_recall(reference=reference, samples=samples, **options) == expected
    return expected


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_clouds_that_overlap(k, offset):
    reference, samples = normal(150, 8) + offset, 0.7 * normal(120, 8, seed=1) + 0.4 + offset
    found = assert_equal_for_any_block_size(reference, samples, k)
    assert 0.0 < found.recall < found.precision <= 1.0


def test_copies_in_both_sets_and_across_them():
    """Balls of radius 0 hold the copies of their centre; a third neighbour shared by both sets lies on the surface."""
    reference, samples = normal(60, 16), normal(50, 16, seed=1)
    reference = torch.cat([reference, reference[:10], reference[:10], reference[:10], reference[20:30]])
    samples = torch.cat([samples, reference[5:35], samples[:8], samples[:8], samples[:8]])
    found = assert_equal_for_any_block_size(reference, samples)
    assert 0.0 < found.precision < 1.0


def test_points_on_the_surface_are_inside():
    """On a grid of whole numbers nearly every comparison is a tie; moved, its float32 products are inexact."""
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)
    for offset, scale in ((0.0, 1.0), (1000.0, 0.125)):
        reference, samples = scale * grid + offset, scale * (grid[::2] + torch.tensor([1.0, 0.0, 2.0])) + offset
        assert_equal_for_any_block_size(reference, samples)


def test_surfaces_closer_than_float32_can_tell():
    """Each sample lies within 1e-9 of a ball's surface, inside or outside."""
    centres = 100.0 * normal(20, 10).double()
    directions = torch.nn.functional.normalize(normal(20, 10, seed=1).double(), dim=1)
    others = torch.cat([centres + radius * directions for radius in (0.1, 0.2, 1.0)])
    reference = torch.cat([centres, others])
    signs = 1.0 - 2.0 * (torch.arange(20, dtype=torch.float64) % 2)[:, None]
    samples = centres - (1.0 + 1e-9 * signs) * directions
    found = assert_equal_for_any_block_size(reference, samples)
    assert found.precision == pytest.approx(0.5)


def test_the_same_set_twice():
    features = normal(80, 30)
    assert precision_recall(reference=features, samples=features.clone()) == PrecisionRecall(
        precision=1.0, recall=1.0, num_neighbours=3
    )


def test_sets_that_have_collapsed_to_a_point():
    point, elsewhere = torch.ones(300, 20), torch.full((300, 20), 1.0 + 1e-6)
    both = precision_recall(reference=point, samples=point.clone(), block_size=100)
    assert (both.precision, both.recall) == (1.0, 1.0)
    apart = precision_recall(reference=point, samples=elsewhere, block_size=100)
    assert (apart.precision, apart.recall) == (0.0, 0.0)
    mode = precision_recall(reference=normal(300, 20), samples=normal(300, 20)[:1].expand(300, -1))
    assert (mode.precision, mode.recall) == (1.0, 1.0 / 300)


def test_precision_is_the_samples_and_recall_the_reference_s():
    """Samples from one of two clusters are all real, and reach half of what is there."""
    near, far = normal(100, 2), normal(100, 2, seed=1) + 100.0
    found = precision_recall(reference=torch.cat([near, far]), samples=near + 1e-3)
    assert (found.precision, found.recall) == (1.0, 0.5)


def test_features_of_inception_s_size():
    reference, samples = normal(400, 2048).abs(), 0.97 * normal(300, 2048, seed=1).abs()
    within = [cdist(each.double(), each.double(), "sqeuclidean") for each in (reference, samples)]
    radii = [np.sort(squared, axis=1)[:, 3] for squared in within]
    between = cdist(reference.double(), samples.double(), "sqeuclidean")
    found = precision_recall(reference=reference, samples=samples, block_size=256)
    assert found.precision == (between <= radii[0][:, None]).any(0).mean()
    assert found.recall == (between <= radii[1][None]).any(1).mean()
    assert 0.0 < found.recall < 1.0


def test_faults_are_named():
    features = normal(10, 3)
    with pytest.raises(ValueError, match="at least 4 images in each set; there are 3 in the samples"):
        precision_recall(reference=features, samples=features[:3])
    with pytest.raises(ValueError, match="there are 0 in the reference"):
        precision_recall(reference=features[:0], samples=features)
    assert precision_recall(reference=features, samples=features[:4]).num_neighbours == 3
    broken = features.clone()
    broken[4, 1] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        precision_recall(reference=features, samples=broken)
