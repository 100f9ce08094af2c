"""Latents between nearest neighbours: closed forms, order, memory-mapped files, the released code's choices, faults."""

import math

import numpy as np
import pytest
import torch

from eqvae.metrics.interpolation import (
    PAPER,
    RELEASED_CODE,
    LatentInterpolation,
    choose_neighbours,
    interpolate,
    nearest_neighbour_interpolations,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interpolated(latents, **options) -> torch.Tensor:
    return torch.cat(list(nearest_neighbour_interpolations(latents, **options)))


def test_two_latents_meet_at_their_midpoint_twice():
    z = noise(2, 4, 3, 5)
    assert torch.allclose(interpolated(z), z.mean(0, keepdim=True).expand(2, -1, -1, -1))


def test_neighbours_come_from_the_same_cluster():
    centres = torch.tensor([-100.0, 100.0]).repeat_interleave(10)[:, None, None, None]
    z = noise(20, 2, 4, 4) + centres
    chosen = choose_neighbours(z)
    assert bool(((chosen < 10) == (torch.arange(20) < 10)).all())
    assert bool((chosen != torch.arange(20)).all())
    assert torch.allclose(interpolated(z), (z + z[chosen]) / 2, atol=1e-4)


def test_the_neighbour_is_the_nearest_in_any_memory_layout():
    z = noise(30, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    distances = torch.cdist(z.flatten(1).double(), z.flatten(1).double()).fill_diagonal_(math.inf)
    assert torch.equal(choose_neighbours(z), distances.argmin(1))


def test_the_weight_is_the_neighbours():
    z = torch.tensor([0.0, 1.0, 10.0]).view(3, 1, 1, 1)
    assert interpolated(z, interpolation=LatentInterpolation(weight=0.25)).flatten().tolist() == [0.25, 0.75, 7.75]
    assert torch.equal(interpolated(z, interpolation=LatentInterpolation(weight=0.0)), z)
    assert interpolated(z, interpolation=LatentInterpolation(weight=1.0)).flatten().tolist() == [1.0, 0.0, 1.0]


def test_on_a_convex_latent_set_decoded_images_stay_in_the_set(averaging_autoencoder):
    # Ramps a * x + b decode to staircases: a midpoint of two ramps is a ramp, and so is its decoding.
    ramp = torch.linspace(-0.5, 0.5, 32).expand(1, 3, 32, 32)
    parameters = noise(12, 2)[:, :, None, None, None]
    z = averaging_autoencoder.encode(parameters[:, 0] * ramp + parameters[:, 1]).mode()
    chosen = choose_neighbours(z)
    expected = (parameters + parameters[chosen]) / 2
    direct = averaging_autoencoder.encode(expected[:, 0] * ramp + expected[:, 1]).mode()
    decoded = averaging_autoencoder.decode(interpolated(z))
    assert torch.allclose(decoded, averaging_autoencoder.decode(direct), atol=1e-5)


@pytest.mark.parametrize("interpolation", [PAPER, RELEASED_CODE], ids=["paper", "released-code"])
def test_batch_size_does_not_matter_and_results_repeat(interpolation):
    z = noise(23, 4, 4, 4)
    expected = interpolated(z, interpolation=interpolation)
    assert expected.shape == z.shape
    for batch_size in (1, 5, 23, 100):
        assert torch.equal(interpolated(z, interpolation=interpolation, batch_size=batch_size), expected)
    assert [len(each) for each in nearest_neighbour_interpolations(z, batch_size=10)] == [10, 10, 3]


def test_a_memory_mapped_file_serves(tmp_path):
    z = noise(9, 2, 4, 4)
    np.save(tmp_path / "latents.npy", z.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "latents.npy", mmap_mode="c"))
    assert torch.equal(interpolated(mapped, batch_size=4), interpolated(z))


def test_half_precision_latents_are_interpolated_in_float32():
    z = noise(6, 2, 4, 4).half()
    assert torch.equal(interpolated(z), interpolated(z.float()))


def test_neighbours_may_be_sought_in_a_reference():
    z, reference = noise(5, 2, 4, 4), noise(40, 2, 4, 4, seed=1)
    distances = torch.cdist(z.flatten(1).double(), reference.flatten(1).double())
    assert torch.equal(choose_neighbours(z, reference=reference), distances.argmin(1))
    assert torch.allclose(interpolated(z, reference=reference), (z + reference[distances.argmin(1)]) / 2)
    # In a reference of their own, latents find themselves.
    assert torch.equal(interpolated(z, reference=z.clone()), z)


def test_a_copy_is_a_neighbour():
    z = noise(6, 2, 4, 4)
    z[4] = z[1]
    chosen = choose_neighbours(z)
    assert (int(chosen[1]), int(chosen[4])) == (4, 1)
    assert torch.equal(interpolated(z)[1], z[1])


def test_the_great_circle_keeps_norms_and_halves_angles():
    spherical = LatentInterpolation(path="spherical")
    a, b = noise(8, 4, 4, 4), noise(8, 4, 4, 4, seed=1)
    a, b = (z / z.flatten(1).norm(dim=1)[:, None, None, None] for z in (a, b))
    middle = interpolate(a, b, spherical)
    assert torch.allclose(middle.flatten(1).norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.allclose((middle * a).flatten(1).sum(1), (middle * b).flatten(1).sum(1), atol=1e-5)
    quarter = interpolate(a, b, LatentInterpolation(path="spherical", weight=0.25))
    angles = [torch.acos((z * a).flatten(1).sum(1)) for z in (quarter, b)]
    assert torch.allclose(4.0 * angles[0], angles[1], atol=1e-3)


def test_the_great_circle_of_parallel_latents_is_the_line():
    a = noise(3, 2, 4, 4)
    for b in (a, 3.0 * a, -a, torch.zeros_like(a)):
        middle = interpolate(a, b, LatentInterpolation(path="spherical"))
        assert bool(middle.isfinite().all())
    assert torch.allclose(interpolate(a, 3.0 * a, LatentInterpolation(path="spherical")), 2.0 * a, atol=1e-4)


def test_on_the_great_circle_the_neighbour_is_the_nearest_by_angle():
    z = torch.tensor([[1.0, 0.0], [5.0, 0.1], [0.9, 0.6]]).view(3, 2, 1, 1)
    assert int(choose_neighbours(z)[0]) == 2
    assert int(choose_neighbours(z, interpolation=LatentInterpolation(path="spherical"))[0]) == 1


def test_candidates_are_drawn_by_how_near_they_are():
    # One number per latent, so the mean squared differences from 0 are 1, 4 and 100: softmax gives 0.953 to the first.
    reference = torch.tensor([1.0, 2.0, 10.0, 50.0]).view(4, 1, 1, 1)
    z = torch.zeros(2000, 1, 1, 1)
    drawn = choose_neighbours(z, reference=reference, interpolation=LatentInterpolation(num_candidates=3))
    share = torch.bincount(drawn, minlength=4) / 2000
    assert share.tolist() == pytest.approx([0.953, 0.047, 0.0, 0.0], abs=0.015)
    other = choose_neighbours(z, reference=reference, interpolation=LatentInterpolation(num_candidates=3), seed=1)
    assert not torch.equal(drawn, other)
    fewer = choose_neighbours(z[:100], reference=reference, interpolation=LatentInterpolation(num_candidates=3))
    assert torch.equal(fewer, drawn[:100])


def test_faults_show_before_the_first_batch():
    z = noise(3, 2, 4, 4)
    with pytest.raises(ValueError, match="1 nearest neighbours need as many points"):
        nearest_neighbour_interpolations(z[:1])
    with pytest.raises(ValueError, match="10 nearest neighbours"):
        nearest_neighbour_interpolations(z, interpolation=RELEASED_CODE)
    with pytest.raises(ValueError, match=r"\(2, 4, 5\), not \(2, 4, 4\)"):
        nearest_neighbour_interpolations(z, reference=noise(3, 2, 4, 5))
    with pytest.raises(ValueError, match="batch_size is 0"):
        nearest_neighbour_interpolations(z, batch_size=0)
    with pytest.raises(ValueError, match="weight is 1.5"):
        LatentInterpolation(weight=1.5)
    with pytest.raises(ValueError, match="num_candidates is 0"):
        LatentInterpolation(num_candidates=0)
    z[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        nearest_neighbour_interpolations(z)
