"""The SDE sampler: marginals of a Gaussian for every diffusion, last steps in closed form, REPA's sampler."""

import itertools
import math

import pytest
import torch

from eqvae.errors import UserError
from eqvae.generators.interpolant import Interpolant
from eqvae.runtime.seeds import generator_for
from eqvae.sampling.noise import NOISE_STREAM, ImageNoise
from eqvae.sampling.sde import diffusion_coefficient, euler_maruyama

DIFFUSIONS = ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"]
LABELS = torch.zeros(4, dtype=torch.int64)


def noise(num=4, dtype=torch.float32, shape=(4, 32, 32)):
    return ImageNoise(0, range(num), shape, dtype=dtype)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_the_marginals_are_the_interpolants(target, path, diffusion):
    # Both directions of time in turn: each path and each diffusion meets both.
    time_of_data = (["linear", "gvp", "vp"].index(path) + DIFFUSIONS.index(diffusion)) % 2
    interpolant = Interpolant(path=path, time_of_data=time_of_data)
    steps = []
    # A last step without noise narrows the data a little: it is measured on its own below.
    z = euler_maruyama(
        target.output(interpolant),
        noise(),
        LABELS,
        interpolant,
        num_steps=200,
        diffusion_form=diffusion,
        last_step="none",
        callback=steps.append,
    )
    states = [(float(step.t[0]), step.z) for step in steps[40::40]] + [
        (interpolant.sampling_times(cut_data_end=True)[1], z)
    ]
    for t, state in states:
        mean, deviation = target.moments(interpolant, t)
        assert float(state.mean()) == pytest.approx(mean, abs=0.015)
        assert float(state.std()) == pytest.approx(deviation, rel=0.03)


def test_a_scaled_diffusion_keeps_the_marginals(target):
    interpolant = Interpolant()
    for norm in (0.0, 2.0):
        z = euler_maruyama(target.output(interpolant), noise(), LABELS, interpolant, diffusion_norm=norm)
        assert float(z.mean()) == pytest.approx(target.mean, abs=0.02)
        assert float(z.std()) == pytest.approx(target.deviation, rel=0.05)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_both_directions_of_time_have_the_same_diffusion(path, diffusion):
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    ours = diffusion_coefficient(Interpolant(path=path), t, diffusion, 0.7)
    theirs = diffusion_coefficient(Interpolant(path=path, time_of_data=1), 1 - t, diffusion, 0.7)
    torch.testing.assert_close(ours, theirs)
    assert (ours >= 0).all()


def test_diffusions_have_sits_closed_forms():
    t, norm = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 0.7  # SiT's time: data at 1
    linear, gvp, vp = (Interpolant(path=path, time_of_data=1) for path in ("linear", "gvp", "vp"))
    for interpolant, diffusion, expected in [
        (linear, "constant", torch.full_like(t, norm)),
        (linear, "sbdm", norm * ((1 - t) ** 2 / t + (1 - t))),
        (gvp, "sbdm", norm * math.pi / 2 * (torch.cos(t * math.pi / 2) / torch.sin(t * math.pi / 2))),
        (vp, "sbdm", norm * (0.1 + (1 - t) * 19.9) / 2),
        (linear, "sigma", norm * (1 - t)),
        (gvp, "sigma", norm * torch.cos(t * math.pi / 2)),
        (gvp, "linear", norm * (1 - t)),
        (linear, "decreasing", 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2),
        (linear, "increasing-decreasing", norm * torch.sin(math.pi * t) ** 2),
    ]:
        torch.testing.assert_close(diffusion_coefficient(interpolant, t, diffusion, norm), expected)


@pytest.mark.parametrize("time_of_data", [0, 1])
@pytest.mark.parametrize("last_step", ["mean", "euler", "tweedie"])
def test_the_last_step_has_its_closed_form(target, last_step, time_of_data):
    interpolant = Interpolant(time_of_data=time_of_data)
    steps = []
    z = euler_maruyama(
        target.output(interpolant),
        noise(2, torch.float64),
        LABELS[:2],
        interpolant,
        num_steps=10,
        last_step=last_step,
        last_step_size=0.1,
        callback=steps.append,
    )
    assert len(steps) == 10
    before = steps[-1].z
    variance = (0.9 * target.deviation) ** 2 + 0.1**2
    centred = (before - 0.9 * target.mean) / variance
    start, epsilon = target.mean + 0.9 * target.deviation**2 * centred, 0.1 * centred
    towards_data = start - epsilon
    expected = {
        "mean": before + 0.1 * (towards_data - 0.1 * centred),
        "euler": before + 0.1 * towards_data,
        "tweedie": start,
    }[last_step]
    torch.testing.assert_close(z, expected)


def test_without_a_last_step_noise_goes_on_to_the_cut(target):
    interpolant, steps = Interpolant(), []
    z = euler_maruyama(
        target.output(interpolant),
        noise(2),
        LABELS[:2],
        interpolant,
        num_steps=300,
        last_step="none",
        callback=steps.append,
    )
    assert len(steps) == 300
    assert float(steps[-1].t[0]) == pytest.approx(1e-3 + 0.999 / 300)
    assert float(z.std()) == pytest.approx(target.deviation, rel=0.05)


def test_the_defaults_are_repas_sampler(target):
    interpolant, num_steps = Interpolant(), 20
    ours = euler_maruyama(
        target.output(interpolant), noise(1, torch.float64), LABELS[:1], interpolant, num_steps=num_steps
    )
    # Plainly from the published description: t falls from 1 to 0.04, g^2 = 2 t, and one step to 0 without noise.
    generator = generator_for(0, 0, NOISE_STREAM)
    z = torch.randn(4, 32, 32, generator=generator).double()[None]
    times = [1 - 0.96 * step / (num_steps - 1) for step in range(num_steps)] + [0.0]
    for now, following in itertools.pairwise(times):
        t = torch.full((1,), now, dtype=torch.float64)
        velocity = target.output(interpolant)(z, t, LABELS[:1])
        score = -((1 - now) * velocity + z) / now
        z = z + (following - now) * (velocity - now * score)
        if following > 0:
            z = z + math.sqrt(2 * now * (now - following)) * torch.randn(4, 32, 32, generator=generator).double()
    torch.testing.assert_close(ours, z)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 1}, "1 steps do not suffice"),
        ({"num_steps": 0, "last_step": "none"}, "0 steps"),
        ({"last_step_size": 0.0}, "last step"),
        ({"last_step_size": 1.0}, "last step"),
        ({"diffusion_norm": -1.0}, "factor -1.0"),
    ],
)
def test_wrong_settings_are_named(target, settings, message):
    with pytest.raises(UserError, match=message):
        euler_maruyama(target.output(Interpolant()), noise(2), LABELS[:2], Interpolant(), **settings)
