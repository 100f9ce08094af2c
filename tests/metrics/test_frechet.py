"""Frechet distance: closed forms, SciPy's matrix square root, streamed moments."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import scipy.linalg
import torch

from eqvae.errors import UserError
from eqvae.metrics.frechet import FeatureMoments, frechet_distance


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_of_rank(num_features, rank, seed=0):
    factor = normal(num_features, rank, seed=seed) * torch.logspace(0, -2, rank, dtype=torch.float64)
    return factor @ factor.T


def moments_of(features, batch_size):
    moments = FeatureMoments()
    for batch in features.split(batch_size):
        moments.add(batch)
    return moments


def by_square_root(mean_a, covariance_a, mean_b, covariance_b):
    root = scipy.linalg.sqrtm((covariance_a @ covariance_b).numpy()).real
    squares = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace()
    return float(squares) - 2.0 * np.trace(root)


def test_equal_gaussians_have_no_distance():
    mean, covariance = normal(40), covariance_of_rank(40, 60)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0.0, abs=1e-10)


def test_a_shift_counts_its_squared_length():
    mean, covariance = normal(40), covariance_of_rank(40, 60)
    assert frechet_distance(mean + 0.5, covariance, mean, covariance) == pytest.approx(10.0, rel=1e-12)


def test_diagonal_covariances_compare_standard_deviations():
    s, t, zero = normal(30).abs(), normal(30, seed=1).abs(), torch.zeros(30, dtype=torch.float64)
    expected = float((s - t).square().sum())
    found = frechet_distance(zero, s.square().diag(), zero, t.square().diag())
    assert found == pytest.approx(expected, rel=1e-12)


def test_singular_covariances_have_a_closed_form_too():
    """Rank 1 against rank 1: tr sqrt(A^(1/2) B A^(1/2)) = |<u, v>|. Orthogonal supports share nothing."""
    u, v, zero = normal(50), normal(50, seed=1), torch.zeros(50, dtype=torch.float64)
    expected = u @ u + v @ v - 2.0 * (u @ v).abs()
    found = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert found == pytest.approx(float(expected), rel=1e-12)
    s = torch.cat([torch.ones(20), torch.zeros(30)]).double()
    assert frechet_distance(zero, s.diag(), zero, (1.0 - s).diag()) == pytest.approx(50.0, rel=1e-12)


def test_features_that_are_turned_keep_their_distance_where_the_covariance_is_singular():
    a, b = covariance_of_rank(60, 20), covariance_of_rank(60, 90, seed=1)
    mean, zero = normal(60), torch.zeros(60, dtype=torch.float64)
    turn = torch.linalg.qr(normal(60, 60, seed=2)).Q
    expected = frechet_distance(mean, a, zero, b)
    found = frechet_distance(turn @ mean, turn @ a @ turn.T, zero, turn @ b @ turn.T)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(200, 200), (30, 200), (200, 30), (30, 40)])
def test_parity_with_scipy_s_matrix_square_root(rank_a, rank_b):
    mean_a, mean_b = 0.1 * normal(100), 0.1 * normal(100, seed=1)
    a, b = covariance_of_rank(100, rank_a, seed=2), covariance_of_rank(100, rank_b, seed=3)
    found = frechet_distance(mean_a, a, mean_b, b)
    assert found == pytest.approx(by_square_root(mean_a, a, mean_b, b), rel=1e-6)
    assert found == pytest.approx(frechet_distance(mean_b, b, mean_a, a), rel=1e-12)


def test_fewer_images_than_features():
    a, b = moments_of(normal(20, 64), 7), moments_of(normal(30, 64, seed=1), 7)
    found = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert found == pytest.approx(by_square_root(a.mean, a.covariance, b.mean, b.covariance), rel=1e-6)
    assert frechet_distance(a.mean, a.covariance, a.mean, a.covariance) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_streamed_moments_are_those_of_numpy(batch_size):
    features = normal(500, 12) * 3.0 + 1000.0
    moments = moments_of(features, batch_size)
    assert moments.count == 500 and moments.mean.dtype == moments.covariance.dtype == torch.float64
    assert np.allclose(moments.mean.numpy(), features.numpy().mean(0), rtol=1e-14)
    assert np.allclose(moments.covariance.numpy(), np.cov(features.numpy(), rowvar=False), rtol=0.0, atol=1e-10)


def test_float32_features_far_from_zero_lose_nothing():
    features = (normal(400, 8) + 1e5).float()
    expected = np.cov(features.double().numpy(), rowvar=False)
    assert np.allclose(moments_of(features, 33).covariance.numpy(), expected, rtol=0.0, atol=1e-9)


def test_distances_do_not_depend_on_the_batch_size():
    a, b = normal(300, 20) + 50.0, 1.01 * normal(300, 20, seed=1) + 50.0
    found = []
    for size in (1, 64, 300):
        x, y = moments_of(a, size), moments_of(b, size)
        found.append(frechet_distance(x.mean, x.covariance, y.mean, y.covariance))
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)


def test_merging_is_like_adding():
    features = normal(90, 6) + 20.0
    whole, first, second = moments_of(features, 90), moments_of(features[:40], 11), moments_of(features[40:], 11)
    merged = FeatureMoments()
    for part in (FeatureMoments(), first, second, FeatureMoments()):
        merged.merge(part)
    assert merged.count == 90 and second.count == 50
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-14)
    assert torch.allclose(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_two_processes_sum_to_the_moments_of_one(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from eqvae.metrics.frechet import FeatureMoments
            from eqvae.runtime.processes import join_processes

            processes = join_processes(torch.device("cpu"))
            features = torch.randn(101, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 30.0
            for shares in ((features[:70], features[70:]), (features, features[:0])):
                moments = FeatureMoments()
                moments.add(shares[processes.rank])
                total = moments.summed_over(processes)
                assert total.count == 101, total.count
                assert torch.allclose(total.mean, features.mean(0), rtol=1e-14)
                assert torch.allclose(total.covariance, features.T.cov(), rtol=1e-12, atol=1e-12)
            torch.distributed.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_faults_are_named():
    mean, covariance = normal(4), covariance_of_rank(4, 8)
    constant = moments_of(torch.full((100, 4), 0.1), 7)
    with pytest.raises(UserError, match="do not vary"):
        frechet_distance(mean, covariance, constant.mean, constant.covariance)
    with pytest.raises(UserError, match="do not vary"):
        frechet_distance(mean, covariance, mean, torch.zeros(4, 4))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="first set have NaN or infinite"):
            frechet_distance(mean * bad, covariance, mean, covariance)
        with pytest.raises(UserError, match="second set have NaN or infinite"):
            frechet_distance(mean, covariance, mean, covariance * bad)
    for count in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 images in each set; there are {count}"):
            _ = moments_of(normal(count, 4), 1).covariance
    with pytest.raises(ValueError, match="moments of 4 features meet vectors of 5"):
        constant.add(normal(2, 5))


def test_samples_that_are_all_alike_are_scored_all_the_same():
    mean, covariance = normal(4), covariance_of_rank(4, 8)
    found = frechet_distance(mean, torch.zeros(4, 4), mean, covariance)
    assert found == pytest.approx(float(covariance.trace()))
