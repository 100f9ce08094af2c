"""Interpolants: derivatives, conversions and losses against closed forms."""

import math

import pytest
import torch

from eqvae.errors import UserError
from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.generators.interpolant import Interpolant, InterpolantObjective
from eqvae.generators.protocol import LatentSpecification

SPECIFICATION = LatentSpecification(channels=2, height=3, width=5, num_classes=7)
PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "score", "noise")
DIRECTIONS = (0, 1)
MEAN, STD = 0.7, 1.3


def _latents(num: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num, 2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _times(num: int = 6) -> torch.Tensor:
    return torch.linspace(0.05, 0.95, num, dtype=torch.float64)


def _column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_derivatives_are_derivatives(path, direction):
    interpolant = Interpolant(path=path, time_of_data=direction)
    t = _times().requires_grad_()
    coefficients = interpolant.coefficients(t)
    (d_alpha,) = torch.autograd.grad(coefficients.alpha.sum(), t, retain_graph=True)
    (d_sigma,) = torch.autograd.grad(coefficients.sigma.sum(), t)
    assert torch.allclose(coefficients.alpha_derivative, d_alpha)
    assert torch.allclose(coefficients.sigma_derivative, d_sigma)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_paths_lead_from_data_to_noise(path, direction):
    interpolant = Interpolant(path=path, time_of_data=direction)
    at_data, at_noise = torch.tensor([float(direction)]), torch.tensor([1.0 - direction])
    data, noise = interpolant.coefficients(at_data), interpolant.coefficients(at_noise)
    assert data.alpha.item() == pytest.approx(1.0)
    assert data.sigma.item() == pytest.approx(0.0, abs=1e-6)
    assert noise.alpha.item() == pytest.approx(0.0, abs=0.01)  # VP ends at 0.0066
    assert noise.sigma.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("path", ["gvp", "vp"])
def test_variance_preserving_paths_preserve_variance(path):
    coefficients = Interpolant(path=path).coefficients(_times())
    assert torch.allclose(coefficients.alpha**2 + coefficients.sigma**2, torch.ones(6, dtype=torch.float64))


def test_the_vp_path_is_ddpms_schedule_in_continuous_time():
    steps = torch.tensor([9, 99, 499, 999])
    discrete = GaussianDiffusion().alphas_bar[steps]
    continuous = Interpolant(path="vp").coefficients((steps + 1).double() / 1000).alpha ** 2
    assert torch.allclose(discrete.log(), continuous.log(), rtol=0.06)


@pytest.mark.parametrize("path", PATHS)
def test_directions_mirror_each_other(path):
    z, noise, t = _latents(), _latents(seed=1), _times()
    paper, code = Interpolant(path=path, time_of_data=0), Interpolant(path=path, time_of_data=1)
    assert torch.allclose(paper.add_noise(z, noise, t), code.add_noise(z, noise, 1 - t))
    assert torch.allclose(paper.target_velocity(z, noise, t), -code.target_velocity(z, noise, 1 - t))


def test_the_linear_path_is_a_straight_line():
    z, noise, t = _latents(), _latents(seed=1), _times()
    interpolant = Interpolant()
    assert torch.allclose(interpolant.add_noise(z, noise, t), z + _column(t) * (noise - z))
    assert torch.allclose(interpolant.target_velocity(z, noise, t), noise - z)


def _gaussian_flow(interpolant: Interpolant, z: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a perfect backbone says where the latents are N(MEAN, STD^2): linear regression on z."""
    path = interpolant.coefficients(_column(t))
    variance = (path.alpha * STD) ** 2 + path.sigma**2
    residual = (z - path.alpha * MEAN) / variance
    start, noise = MEAN + path.alpha * STD**2 * residual, path.sigma * residual
    velocity = path.alpha_derivative * start + path.sigma_derivative * noise
    return {"velocity": velocity, "noise": noise, "score": -residual, "start": start}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_converts_to_every_other(path, direction, prediction):
    interpolant = Interpolant(path=path, prediction=prediction, time_of_data=direction)
    z, t = _latents(), _times()
    expected = _gaussian_flow(interpolant, z, t)
    output = torch.cat([expected[prediction], torch.full_like(z, math.nan)], 1)  # published SiTs have a second half
    for name, convert in (
        ("velocity", interpolant.velocity),
        ("score", interpolant.score),
        ("noise", interpolant.noise),
        ("start", interpolant.denoised),
    ):
        assert torch.allclose(convert(output, z, t), expected[name]), name
        assert torch.equal(convert(output[:, :2], z, t), convert(output, z, t))


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_velocities_convert_at_both_ends(path):
    interpolant = Interpolant(path=path)
    z, noise, t = _latents(2), _latents(2, seed=1), torch.tensor([0.0, 1.0], dtype=torch.float64)
    z_t, velocity = interpolant.add_noise(z, noise, t), interpolant.target_velocity(z, noise, t)
    assert torch.allclose(interpolant.denoised(velocity, z_t, t), z)
    assert torch.allclose(interpolant.noise(velocity, z_t, t), noise)


def test_times_are_cut_where_something_would_be_infinite():
    assert Interpolant().training_times() == (0.0, 1.0)
    assert Interpolant(path="vp").training_times() == (1e-5, 1.0)
    assert Interpolant(path="vp", time_of_data=1).training_times() == (0.0, 1.0 - 1e-5)
    assert Interpolant(prediction="noise").training_times() == (1e-3, 1.0 - 1e-3)
    assert Interpolant().sampling_times() == (1.0, 0.0)
    assert Interpolant(time_of_data=1).sampling_times() == (0.0, 1.0)
    assert Interpolant(path="vp").sampling_times() == (1.0, 1e-3)
    assert Interpolant(prediction="score").sampling_times() == (1.0 - 1e-3, 1e-3)
    assert Interpolant().sampling_times(cut_noise_end=True, cut_data_end=True) == (1.0 - 1e-3, 1e-3)
    assert Interpolant(time_of_data=1).sampling_times(cut_noise_end=True) == (pytest.approx(1e-3), 1.0)


def _draws(num: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return InterpolantObjective(num_classes=7).draw(num, SPECIFICATION, torch.Generator().manual_seed(seed))


def test_draws_have_one_row_for_each_image():
    draws = _draws(64)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "t": (64,), "noise": (64, 2, 3, 5), "drop": (64,),
    }  # fmt: skip
    assert torch.equal(draws["noise"], _draws(64)["noise"])
    assert not torch.equal(draws["noise"], _draws(64, seed=1)["noise"])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_velocity_loss_is_the_squared_error(direction):
    interpolant = Interpolant(time_of_data=direction)
    objective = InterpolantObjective(num_classes=7, interpolant=interpolant)
    z, draws, seen = (
        _latents(dtype=torch.float32),
        _draws(6) | {"drop": torch.tensor([0.0, 0.09, 0.1, 0.2, 0.5, 0.9])},
        {},
    )

    def predict(z_t, t, labels):
        seen.update(z=z_t, t=t, labels=labels)
        return 0.5 * z_t

    loss = objective.loss(predict, z, torch.arange(6), draws)
    assert torch.equal(seen["t"], draws["t"])
    assert torch.allclose(seen["z"], interpolant.add_noise(z, draws["noise"], draws["t"]))
    assert seen["labels"].tolist() == [7, 7, 2, 3, 4, 5]
    target = (draws["noise"] - z) * (1 if direction == 0 else -1)
    expected = (0.5 * seen["z"] - target).square().flatten(1).mean(1)
    assert torch.allclose(loss.total, expected)
    assert torch.equal(loss.parts["mse"], loss.total)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_the_velocity_weight_makes_any_error_the_velocitys(path, prediction):
    interpolant = Interpolant(path=path, prediction=prediction)
    objective = InterpolantObjective(num_classes=0, interpolant=interpolant, weight="velocity")
    z, draws = _latents(dtype=torch.float32), _draws(6) | {"t": _times().float()}
    loss = objective.loss(lambda z_t, *_: 0.3 * z_t, z, torch.zeros(6, dtype=torch.int64), draws)
    t = objective.times(draws["t"])
    z_t = interpolant.add_noise(z, draws["noise"], t)
    error = interpolant.velocity(0.3 * z_t, z_t, t) - interpolant.target_velocity(z, draws["noise"], t)
    assert torch.allclose(loss.total, error.square().flatten(1).mean(1), rtol=1e-3)


def test_the_likelihood_weight_is_half_beta_over_the_variance_on_the_vp_path():
    interpolant = Interpolant(path="vp", prediction="noise")
    objective = InterpolantObjective(num_classes=0, interpolant=interpolant, weight="likelihood")
    draws = _draws(6) | {"t": _times().float()}
    z = _latents(dtype=torch.float32)
    loss = objective.loss(lambda z_t, *_: torch.zeros_like(z_t), z, torch.zeros(6, dtype=torch.int64), draws)
    t = objective.times(draws["t"])
    beta = 0.1 + t * (20.0 - 0.1)
    expected = beta / 2 / interpolant.coefficients(t).sigma ** 2 * draws["noise"].square().flatten(1).mean(1)
    assert torch.allclose(loss.total, expected, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_backbone_reaches_the_irreducible_loss(prediction):
    interpolant = Interpolant(prediction=prediction)
    objective = InterpolantObjective(num_classes=0, interpolant=interpolant)
    z, draws = MEAN + STD * _latents(500, dtype=torch.float32), _draws(500)
    labels = torch.zeros(500, dtype=torch.int64)
    best = objective.loss(lambda z_t, t, _: _gaussian_flow(interpolant, z_t, t)[prediction], z, labels, draws)
    worse = objective.loss(lambda z_t, t, _: 1.2 * _gaussian_flow(interpolant, z_t, t)[prediction], z, labels, draws)
    assert 0.0 < best.total.mean() < worse.total.mean()


def test_the_second_half_of_a_doubled_output_is_ignored():
    objective = InterpolantObjective(num_classes=0, doubled_output=True)
    assert (objective.out_channels(4), InterpolantObjective(num_classes=0).out_channels(4)) == (8, 4)
    output = torch.randn(6, 4, 3, 5, requires_grad=True)
    z, labels = _latents(dtype=torch.float32), torch.zeros(6, dtype=torch.int64)
    loss = objective.loss(lambda *_: output, z, labels, _draws(6))
    (gradient,) = torch.autograd.grad(loss.total.sum(), output)
    assert gradient[:, :2].abs().min() > 0
    assert gradient[:, 2:].abs().max() == 0


def test_choices_that_exclude_each_other_are_refused():
    with pytest.raises(UserError, match="loss weight"):
        InterpolantObjective(num_classes=0, weight="velocity")
