"""ODE samplers: a Gaussian's flow in closed form, orders of convergence, SciPy and torchdiffeq as other solvers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import RK45, solve_ivp
from torchdiffeq import odeint

from eqvae.errors import UserError
from eqvae.generators.interpolant import Interpolant
from eqvae.sampling.noise import ImageNoise
from eqvae.sampling.ode import ERROR, NODES, STAGES, dopri5, euler, heun, integrate

SHAPE = (2, 4, 4)
LABELS = torch.tensor([0, 1, 2])
PATHS = [Interpolant(path=path, time_of_data=time_of_data) for path in ("linear", "gvp") for time_of_data in (0, 1)]


def noise(indices=range(3), dtype=torch.float64, shape=SHAPE):
    return ImageNoise(0, indices, shape, dtype=dtype)


class Counter:
    """Counts the calls of a prediction and the images in them."""

    def __init__(self, predict) -> None:
        self.predict, self.batch_sizes = predict, []

    def __call__(self, z, t, labels):
        self.batch_sizes.append(len(z))
        return self.predict(z, t, labels)


def uneven(z, t, labels):
    """Each label's flow needs steps of another size; elementwise."""
    return torch.sin((1 + 6 * labels)[:, None, None, None] * z) - 2 * t[:, None, None, None] * z


@pytest.mark.parametrize("interpolant", PATHS, ids=str)
@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_fixed_steps_converge_at_their_orders(target, interpolant, sampler, order):
    exact = target.flow(interpolant, noise().next())
    nums = [32, 64, 128, 256]
    errors = []
    for num_steps in nums:
        z = sampler(target.output(interpolant), noise(), LABELS, interpolant, num_steps=num_steps)
        errors.append(float((z - exact).abs().max()))
    slope = np.polyfit(np.log(nums), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.15)


@pytest.mark.parametrize("interpolant", PATHS, ids=str)
def test_dopri5_has_order_five(target, interpolant):
    wide = replace(target, deviation=0.8)
    exact = wide.flow(interpolant, noise().next())
    predict = Counter(wide.output(interpolant))
    nums, errors = [8, 16, 32, 64], []
    for num_steps in nums:
        grid, z = torch.linspace(*interpolant.sampling_times(), num_steps + 1).double().tolist(), noise().next()
        predict.batch_sizes.clear()
        for start, end in itertools.pairwise(grid):  # tolerances so large that each interval is one step
            z = integrate(predict, z, start, end, rtol=1.0, atol=1.0, max_num_steps=1)
        errors.append(float((z - exact).abs().max()))
        assert len(predict.batch_sizes) == num_steps * (2 + 6)
    slope = np.polyfit(np.log(nums), np.log(errors), 1)[0]
    if interpolant.path == "linear":
        assert slope == pytest.approx(-5, abs=0.15)
    else:  # the terms of order 5 nearly cancel over a quarter of a circle
        assert -6.5 < slope < -4.9


@pytest.mark.parametrize("interpolant", PATHS, ids=str)
def test_dopri5s_error_follows_its_tolerance(target, interpolant):
    exact = target.flow(interpolant, noise().next())
    for tolerance in (1e-3, 1e-6, 1e-9):
        z = dopri5(target.output(interpolant), noise(), LABELS, interpolant, rtol=tolerance, atol=tolerance)
        assert (z - exact).abs().max() < 100 * tolerance  # a tolerance bounds the error of one step


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("time_of_data", [0, 1])
def test_every_prediction_and_path_follows_the_same_flow(target, prediction, path, time_of_data):
    interpolant = Interpolant(path=path, prediction=prediction, time_of_data=time_of_data)
    z = dopri5(target.output(interpolant), noise(), LABELS, interpolant, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(z, target.flow(interpolant, noise().next()), atol=1e-5, rtol=0)
    z = heun(target.output(interpolant), noise(), LABELS, interpolant, num_steps=150)
    torch.testing.assert_close(z, target.flow(interpolant, noise().next()), atol=0.05, rtol=0)


def test_fixed_steps_ask_as_often_as_they_say(target):
    interpolant = Interpolant()
    for sampler, calls in ((euler, 5), (heun, 9)):
        predict = Counter(target.output(interpolant))
        sampler(predict, noise(), LABELS, interpolant, num_steps=5)
        assert predict.batch_sizes == [3] * calls


def test_the_tableau_is_scipys():
    np.testing.assert_array_equal(NODES[:6], RK45.C)
    for row, weights in enumerate(STAGES[:6]):
        np.testing.assert_allclose(weights, RK45.A[row, :row], rtol=1e-15)
    np.testing.assert_allclose(STAGES[6], RK45.B, rtol=1e-15)
    np.testing.assert_allclose(-np.array(ERROR), RK45.E, rtol=1e-14)


@pytest.mark.parametrize("time_of_data", [0, 1])
@pytest.mark.parametrize("tolerances", [(1e-3, 1e-6), (1e-8, 1e-10)])
def test_each_image_is_integrated_as_scipy_integrates_it_alone(time_of_data, tolerances):
    interpolant = Interpolant(time_of_data=time_of_data)
    rtol, atol = tolerances
    predict = Counter(uneven)
    z = dopri5(predict, noise(), LABELS, interpolant, rtol=rtol, atol=atol)
    num_calls = 0
    for row, start in enumerate(noise().next()):

        def slope(t, y, row=row):
            image = torch.from_numpy(y).view(1, *SHAPE)
            return uneven(image, torch.tensor([t], dtype=torch.float64), LABELS[row : row + 1]).flatten().numpy()

        solution = solve_ivp(
            slope, interpolant.sampling_times(), start.flatten().numpy(), rtol=rtol, atol=atol, t_eval=None
        )
        np.testing.assert_allclose(z[row].flatten(), solution.y[:, -1], atol=1e-11)
        num_calls += solution.nfev
    assert sum(predict.batch_sizes) == num_calls


def test_dopri5_agrees_with_torchdiffeq_on_each_image_alone():
    interpolant = Interpolant()
    z = dopri5(uneven, noise(), LABELS, interpolant, rtol=1e-8, atol=1e-8)
    for row, start in enumerate(noise().next()):

        def slope(t, y, row=row):
            return uneven(y, t.expand(1), LABELS[row : row + 1])

        times = torch.tensor(interpolant.sampling_times(), dtype=torch.float64)
        other = odeint(slope, start[None], times, rtol=1e-8, atol=1e-8, method="dopri5")[-1, 0]
        torch.testing.assert_close(z[row], other, atol=1e-4, rtol=0)


def test_torchdiffeq_lets_neighbours_in_and_dopri5_does_not():
    interpolant = Interpolant()
    times = torch.tensor(interpolant.sampling_times(), dtype=torch.float64)

    def images(indices):
        start, labels = noise(indices).next(), LABELS[list(indices)]
        return odeint(lambda t, y: uneven(y, t.expand(len(y)), labels), start, times, rtol=1e-3, atol=1e-6)[-1]

    assert not torch.allclose(images([0, 2])[0], images([0])[0], atol=1e-7)
    together = dopri5(uneven, noise([0, 2]), LABELS[[0, 2]], interpolant)
    alone = dopri5(uneven, noise([0]), LABELS[[0]], interpolant)
    assert torch.equal(together[:1], alone)


def test_images_that_have_arrived_cost_nothing_more():
    predict = Counter(uneven)
    dopri5(predict, noise(), LABELS, Interpolant())
    assert predict.batch_sizes[0] == 3
    assert predict.batch_sizes[-1] == 1


@pytest.mark.parametrize("sampler", [euler, heun, dopri5])
def test_the_callback_sees_times_states_and_denoised_latents(target, sampler):
    interpolant = Interpolant(path="gvp", time_of_data=1)
    steps = []
    settings = {} if sampler is dopri5 else {"num_steps": 6}
    sampler(target.output(interpolant), noise(), LABELS, interpolant, callback=steps.append, **settings)
    assert [step.step for step in steps] == list(range(len(steps)))
    assert torch.equal(steps[0].z, noise().next())
    assert torch.equal(steps[0].t, torch.zeros(3, dtype=torch.float64))
    if sampler is not dopri5:
        torch.testing.assert_close(torch.stack([step.t[0] for step in steps]), torch.arange(6).double() / 6)
    for step in steps:
        path = interpolant.coefficients(step.t)
        alpha, sigma = path.alpha[:, None, None, None], path.sigma[:, None, None, None]
        gain = alpha * target.deviation**2 / ((alpha * target.deviation) ** 2 + sigma**2)
        torch.testing.assert_close(step.denoised, target.mean + gain * (step.z - alpha * target.mean))


def test_a_broken_generator_is_named():
    def broken(z, t, labels):
        return torch.where(t[:, None, None, None] < 0.5, torch.nan, z)

    with pytest.raises(UserError, match=r"not finite near t = 0\.[5-9]"):
        dopri5(broken, noise(), LABELS, Interpolant())
    with pytest.raises(UserError, match="not finite near t = 1"):
        dopri5(lambda z, t, labels: z * torch.inf, noise(), LABELS, Interpolant())


def test_too_few_steps_are_named(target):
    interpolant = Interpolant()
    with pytest.raises(UserError, match="within 2 steps"):
        dopri5(target.output(interpolant), noise(), LABELS, interpolant, max_num_steps=2)
    with pytest.raises(UserError, match="0 steps"):
        euler(target.output(interpolant), noise(), LABELS, interpolant, num_steps=0)
    with pytest.raises(UserError, match="tolerances"):
        dopri5(target.output(interpolant), noise(), LABELS, interpolant, rtol=0.0)


def test_a_flow_without_motion_takes_few_steps():
    z = dopri5(lambda z, t, labels: torch.zeros_like(z), noise(), LABELS, Interpolant(), max_num_steps=20)
    assert torch.equal(z, noise().next())
