"""Feature statistics: moments of NumPy, the same for any batch size, saved and read again, ADM's files."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from eqvae.artifacts.files import write_tensors
from eqvae.artifacts.sample_sets import write_sample_set
from eqvae.errors import UserError
from eqvae.images.image_sets import open_samples
from eqvae.metrics.statistics import FeatureStatistics, compute_statistics, holds_statistics, with_adm_moments
from eqvae.networks.features import FeatureExtractor, Features
from eqvae.runtime.processes import Processes

CPU = torch.device("cpu")
ALONE = Processes(rank=0, count=1, device=CPU)


class MeanColours(FeatureExtractor):
    """Twelve numbers an image: means of its quarters; the corner pixels as spatial features."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.weights_fingerprint = "mean-colours", "0" * 16

    def forward(self, images: Tensor) -> Features:
        x = images.float()
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return Features(pooled=pooled, spatial=x[..., 0, :2].flatten(1), logits=pooled[:, :4] / 100)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2100, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def samples(tmp_path, images):
    write_sample_set(tmp_path / "samples.npz", images)
    return open_samples(tmp_path / "samples.npz")


def compute(samples, processes=ALONE, **options):
    options = {"indices": range(len(samples)), "batch_size": 64, "keep_logits": True} | options
    return compute_statistics(MeanColours(), samples, device=CPU, processes=processes, **options)


def test_moments_are_numpy_s(samples, images):
    statistics = compute(samples)
    pooled = images.reshape(-1, 2, 2, 2, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(-1, 12)
    np.testing.assert_allclose(statistics.mean, pooled.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.covariance, np.cov(pooled, rowvar=False), rtol=1e-6, atol=1e-4)
    spatial = images[:, 0, :2].transpose(0, 2, 1).reshape(-1, 6).astype(np.float64)
    np.testing.assert_allclose(statistics.spatial_mean, spatial.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.spatial_covariance, np.cov(spatial, rowvar=False), rtol=1e-12, atol=1e-9)
    assert statistics.num_images == 2100
    assert statistics.pooled is not None
    np.testing.assert_allclose(statistics.pooled, pooled, rtol=1e-6)
    assert statistics.logits is not None
    assert statistics.provenance.image_size_px == 4


def test_the_fingerprint_is_of_the_pixels(samples, images, tmp_path):
    digests = b"".join(hashlib.sha256(b"(4, 4, 3)" + image.tobytes()).digest() for image in images)
    expected = hashlib.sha256(digests).hexdigest()[:16]
    assert compute(samples).provenance.fingerprint == expected
    images[2000, 1, 1, 1] ^= 1
    write_sample_set(tmp_path / "other.npz", images)
    assert compute(open_samples(tmp_path / "other.npz")).provenance.fingerprint != expected


@pytest.mark.parametrize("batch_size", [1, 7, 1024, 5000])
def test_nothing_depends_on_the_batch_size(samples, batch_size):
    expected, statistics = compute(samples), compute(samples, batch_size=batch_size)
    assert statistics.provenance == expected.provenance
    for name in ("mean", "covariance", "spatial_mean", "spatial_covariance", "pooled", "logits"):
        torch.testing.assert_close(getattr(statistics, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


def test_logits_are_kept_on_request(samples):
    assert compute(samples, keep_logits=False).logits is None


def test_a_part_of_the_images(samples, images):
    statistics = compute(samples, indices=range(0, 2100, 300))
    assert statistics.num_images == 7
    np.testing.assert_allclose(statistics.spatial_mean[0], images[::300, 0, 0, 0].mean())


def test_statistics_are_read_as_they_were_saved(samples, tmp_path):
    for statistics in (
        compute(samples),
        replace(compute(samples, keep_logits=False), spatial_mean=None, spatial_covariance=None),
    ):
        statistics.save(tmp_path / "statistics.safetensors")
        assert holds_statistics(tmp_path / "statistics.safetensors")
        again = FeatureStatistics.load(tmp_path / "statistics.safetensors")
        assert again.provenance == statistics.provenance
        for name in ("mean", "covariance", "spatial_mean", "spatial_covariance", "pooled", "logits"):
            value = getattr(statistics, name)
            assert getattr(again, name) is None if value is None else torch.equal(getattr(again, name), value)


def test_a_file_that_holds_something_else(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"weight": torch.zeros(3)})
    assert not holds_statistics(path)
    assert not holds_statistics(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors' holds no feature statistics"):
        FeatureStatistics.load(path)
    path.write_bytes(path.read_bytes()[:20])
    assert not holds_statistics(path)
    with pytest.raises(UserError, match="truncated"):
        FeatureStatistics.load(path)


def test_features_that_are_not_finite(samples, monkeypatch):
    monkeypatch.setattr(
        MeanColours, "forward", lambda self, images: Features(pooled=torch.full((len(images), 2), torch.nan))
    )
    with pytest.raises(UserError, match=r"mean-colours gives NaN or infinite features for images of .*samples.npz"):
        compute(samples)


# ADM's reference batches --------------------------------------------------------------------------------------------


@pytest.fixture
def adm(tmp_path):
    random = np.random.default_rng(1)
    rows = {"mu": random.normal(size=(50, 12)), "mu_s": random.normal(size=(50, 6))}
    arrays = {key: value.mean(0) for key, value in rows.items()}
    arrays |= {key.replace("mu", "sigma"): np.cov(value, rowvar=False) for key, value in rows.items()}
    return tmp_path / "adm.npz", arrays


def test_adm_s_moments(adm, samples):
    path, arrays = adm
    np.savez(path, **arrays)
    alone = with_adm_moments(None, path)
    assert np.array_equal(alone.mean, arrays["mu"])
    assert np.array_equal(alone.covariance, arrays["sigma"])
    assert np.array_equal(alone.spatial_covariance, arrays["sigma_s"])
    assert alone.pooled is None
    assert alone.num_images is None
    assert alone.provenance.features == "inception"
    assert alone.provenance.moments == "file"
    known = compute(samples)
    joined = with_adm_moments(known, path)
    assert np.array_equal(joined.mean, arrays["mu"])
    assert joined.pooled is known.pooled
    assert joined.provenance.fingerprint == known.provenance.fingerprint
    del arrays["mu_s"], arrays["sigma_s"]
    np.savez(path, **arrays)
    assert with_adm_moments(known, path).spatial_mean is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sigma": np.eye(11)}, "fit together"),
        ({"mu": np.full(12, np.nan)}, "'mu' or 'sigma' that is not finite"),
        ({"sigma_s": np.full((6, 6), np.inf)}, "'mu_s' or 'sigma_s' that is not finite"),
        ({"mu_s": np.zeros((2, 6))}, "fit together"),
    ],
)
def test_adm_s_moments_that_are_wrong(adm, wrong, says):
    path, arrays = adm
    np.savez(path, **(arrays | wrong))
    with pytest.raises(UserError, match=says):
        with_adm_moments(None, path)
    del arrays["sigma"]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="fit together"):
        with_adm_moments(None, path)
