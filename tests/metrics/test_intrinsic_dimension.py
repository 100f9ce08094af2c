"""TwoNN: DADApy's stored figures, scikit-dimension, manifolds of known dimension, the standard error, faults."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import skdim
import torch

from eqvae.metrics.intrinsic_dimension import intrinsic_dimension, two_nn

EXPECTED = json.loads(Path(__file__).with_name("dadapy_expected.json").read_text())["data_sets"]


def _load_maker():
    spec = importlib.util.spec_from_file_location("dadapy_expected", Path(__file__).with_name("dadapy_expected.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _load_maker()


def ball(num_points: int, dimension: int, rng: np.random.Generator) -> np.ndarray:
    points = rng.normal(size=(num_points, dimension))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points * rng.uniform(size=(num_points, 1)) ** (1.0 / dimension)


def cube(num_points: int, dimension: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(size=(num_points, dimension))


def sphere(num_points: int, dimension: int, rng: np.random.Generator) -> np.ndarray:
    points = rng.normal(size=(num_points, dimension + 1))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def embedded(manifold, num_points: int, dimension: int, seed: int = 0) -> torch.Tensor:
    """A manifold in 50 dimensions, by a random rotation and a shift: distances are kept."""
    rng = np.random.default_rng(seed)
    points = manifold(num_points, dimension, rng)
    rotation, _ = np.linalg.qr(rng.normal(size=(50, 50)))
    return torch.from_numpy(points @ rotation[: points.shape[1]] + rng.normal(size=50))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_figures_are_dadapys(name):
    expected = EXPECTED[name]
    points = torch.from_numpy(MAKER.DATA_SETS[name]())
    for fraction, dimension in expected["dimension"].items():
        found = intrinsic_dimension(points, fraction=float(fraction), num_subsamples=0)
        assert found.dimension == pytest.approx(dimension, rel=1e-6)
        assert found.neighbour_distance == pytest.approx(expected["neighbour_distance"], rel=1e-6)
        assert (found.num_points, found.num_duplicates) == (expected["num_points"], expected["num_duplicates"])


def test_the_stored_figures_cover_every_data_set():
    assert set(EXPECTED) == set(MAKER.DATA_SETS)


@pytest.mark.parametrize("name", [name for name, expected in EXPECTED.items() if "decimated_by_10" in expected])
def test_the_subsamples_agree_with_dadapys_decimation(name):
    decimated = EXPECTED[name]["decimated_by_10"]
    found = intrinsic_dimension(torch.from_numpy(MAKER.DATA_SETS[name]()))
    assert found.num_subsamples == 10
    # Other random subsamples of the same points and size: equal up to their own errors.
    assert abs(found.subsample_mean - decimated["dimension"]) < 4.0 * (
        found.standard_error + decimated["standard_error"]
    )
    assert 0.3 < found.standard_error / decimated["standard_error"] < 3.0


@pytest.mark.filterwarnings(
    "ignore:divide by zero encountered in log:RuntimeWarning"
)  # theirs, in a plot's coordinates
@pytest.mark.parametrize("method", ["linear", "mle"])
@pytest.mark.parametrize("name", ["gaussian_20", "cube_10_in_50", "latents", "few"])
def test_scikit_dimension_agrees(name, method):
    points = MAKER.DATA_SETS[name]()
    discarded = 0.1 if method == "linear" else 0.0
    theirs = skdim.id.TwoNN(discard_fraction=discarded, method=method).fit(points.astype(np.float64)).dimension_
    ours = intrinsic_dimension(torch.from_numpy(points), fraction=1.0 - discarded, num_subsamples=0)
    assert ours.dimension == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("manifold", [ball, cube, sphere], ids=["ball", "cube", "sphere"])
@pytest.mark.parametrize(("dimension", "tolerance"), [(2, 0.06), (5, 0.08), (10, 0.2)])
def test_manifolds_of_known_dimension(manifold, dimension, tolerance):
    # Borders bias the estimate downwards, the more the higher the dimension (Facco et al., Figure 3).
    found = intrinsic_dimension(embedded(manifold, 3000, dimension))
    assert found.dimension == pytest.approx(dimension, rel=tolerance)
    assert found.standard_error < 0.05 * dimension


def test_ratios_of_the_assumed_distribution_give_their_dimension():
    # mu = (1 - F)^(-1 / d) at F = i / n; the last, infinite ratio is beyond the fit.
    cumulative = torch.arange(1, 1000, dtype=torch.float64) / 1000
    ratios = torch.cat([(1.0 - cumulative) ** (-1.0 / 7.0), torch.tensor([1e6], dtype=torch.float64)])
    distances = torch.stack([torch.full_like(ratios, 0.5), 0.5 * ratios], dim=1)
    assert two_nn(distances) == pytest.approx(7.0, rel=1e-12)
    assert two_nn(distances.flip(0)) == pytest.approx(7.0, rel=1e-12)


def test_the_standard_error_is_the_spread_of_repetitions():
    found = [intrinsic_dimension(embedded(sphere, 1000, 4, seed), seed=seed) for seed in range(30)]
    spread = np.std([each.dimension for each in found], ddof=1)
    mean_error = np.sqrt(np.mean([each.standard_error**2 for each in found]))
    assert 0.6 < mean_error / spread < 1.6


def test_scale_shift_rotation_and_order_do_not_matter():
    points = embedded(cube, 400, 3)
    expected = intrinsic_dimension(points).dimension
    rotation = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for changed in (1e-3 * points, points + 1e4, points @ rotation, points.flip(0)):
        assert intrinsic_dimension(changed).dimension == pytest.approx(expected, rel=1e-6)


def test_the_seed_alone_decides_the_subsamples():
    points = embedded(cube, 400, 3)
    assert intrinsic_dimension(points, seed=3) == intrinsic_dimension(points, seed=3)
    other = intrinsic_dimension(points, seed=4)
    assert other.dimension == intrinsic_dimension(points, seed=3).dimension
    assert other.standard_error != intrinsic_dimension(points, seed=3).standard_error


def test_a_duplicate_counts_once_wherever_it_stands():
    points = embedded(cube, 300, 3)
    shuffle = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    repeated = torch.cat([points, points[:90], points[:10]])[shuffle]
    found, expected = intrinsic_dimension(repeated), intrinsic_dimension(points)
    assert found.dimension == expected.dimension
    assert (found.num_points, found.num_duplicates) == (300, 100)


def test_half_precision_points_are_taken_as_they_stand():
    points = embedded(cube, 300, 3).half()
    assert intrinsic_dimension(points).dimension == intrinsic_dimension(points.double()).dimension


def test_few_points_have_a_dimension_but_no_error():
    found = intrinsic_dimension(embedded(cube, 39, 2))
    assert (found.standard_error, found.subsample_mean, found.num_subsamples) == (None, None, 0)
    found = intrinsic_dimension(embedded(cube, 75, 2))
    assert (found.num_subsamples, found.subsample_size) == (3, 25)
    assert found.standard_error > 0.0


def test_too_few_distinct_points():
    with pytest.raises(ValueError, match="at least 3 distinct points; there are 2"):
        intrinsic_dimension(torch.randn(2, 4))
    with pytest.raises(ValueError, match="at least 3 distinct points; 10 hold 2"):
        intrinsic_dimension(torch.tensor([[0.0], [1.0]]).repeat(5, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value):
    points = torch.randn(10, 4)
    points[3, 2] = value
    with pytest.raises(ValueError, match="NaN"):
        intrinsic_dimension(points)


def test_a_regular_grid_has_no_ratios():
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    with pytest.raises(ValueError, match="regular grid"):
        intrinsic_dimension(grid)


@pytest.mark.parametrize("arguments", [{"fraction": 0.0}, {"fraction": 1.1}, {"num_subsamples": 1}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        intrinsic_dimension(torch.randn(10, 4), **arguments)
