"""DDPM and DDIM: a Gaussian whose every step is known, and diffusers' schedulers as independent implementations."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from eqvae.errors import UserError
from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.runtime.seeds import generator_for
from eqvae.sampling.diffusion import ddim, ddpm
from eqvae.sampling.noise import NOISE_STREAM, ImageNoise

LABELS = torch.zeros(4, dtype=torch.int64)
DIFFUSION = GaussianDiffusion()


def noise(num=4, dtype=torch.float64, shape=(4, 32, 32)):
    return ImageNoise(0, range(num), shape, dtype=dtype)


def respaced_betas(num_steps):
    """Respace the published schedule by hand."""
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    taken = np.round(np.arange(num_steps) * 999 / (num_steps - 1)).astype(int)
    return taken, 1 - alphas_bar[taken] / np.concatenate([[1.0], alphas_bar[taken[:-1]]])


def curved(z, t, labels):
    """No exact epsilon of anything, elementwise; twice the channels."""
    epsilon = torch.tanh(z) * (1 + t[:, None, None, None] / 1000)
    return torch.cat([epsilon, torch.sin(3 * z)], dim=1)


def first_half(z, t, labels):
    return curved(z, t, labels)[:, : z.shape[1]]


def exact_with_variances(target, num_steps):
    """Predict epsilon and the variance of p(z_{t-1} | z_t) of the Gaussian target, both exactly, for `num_steps`."""
    taken, betas = respaced_betas(num_steps)
    steps = {int(time): step for step, time in enumerate(taken)}
    alphas_bar = np.cumprod(1 - betas)
    previous = np.concatenate([[1.0], alphas_bar[:-1]])
    epsilon = target.epsilon(DIFFUSION)

    def predict(z, t, labels):
        step = steps[int(t[0])]
        beta, alpha_bar, before = betas[step], alphas_bar[step], previous[step]
        smallest = beta * (1 - before) / (1 - alpha_bar)
        if step == 0:
            return torch.cat([epsilon(z, t, labels), torch.zeros_like(z)], dim=1)
        of_start = target.deviation**2 * (1 - alpha_bar) / (alpha_bar * target.deviation**2 + 1 - alpha_bar)
        variance = smallest + (beta * math.sqrt(before) / (1 - alpha_bar)) ** 2 * of_start
        fraction = math.log(variance / smallest) / math.log(beta / smallest)
        return torch.cat([epsilon(z, t, labels), torch.full_like(z, 2 * fraction - 1)], dim=1)

    return predict


@pytest.mark.parametrize("num_steps", [10, 50, 250])
def test_ddpm_with_exact_variances_has_the_exact_marginals(target, num_steps):
    steps = []
    z = ddpm(
        exact_with_variances(target, num_steps), noise(), LABELS, DIFFUSION, num_steps=num_steps, callback=steps.append
    )
    for step in steps[:: num_steps // 5]:
        alpha_bar = DIFFUSION.alphas_bar[step.t[0]].item()
        assert float(step.z.mean()) == pytest.approx(math.sqrt(alpha_bar) * target.mean, abs=0.02)
        deviation = math.sqrt(alpha_bar * target.deviation**2 + 1 - alpha_bar)
        assert float(step.z.std()) == pytest.approx(deviation, rel=0.02)
    assert float(z.mean()) == pytest.approx(target.mean, abs=0.015)
    assert float(z.std()) == pytest.approx(target.deviation, rel=0.02)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_has_the_moments_of_its_affine_recursion(target, eta):
    num_steps = 50
    z = ddim(target.epsilon(DIFFUSION), noise(), LABELS, DIFFUSION, num_steps=num_steps, eta=eta)
    _, betas = respaced_betas(num_steps)
    alphas_bar = np.cumprod(1 - betas)
    mean, variance = 0.0, 1.0
    for step in reversed(range(num_steps)):
        a, b = alphas_bar[step], alphas_bar[step - 1] if step else 1.0
        sigma2 = eta**2 * (1 - b) / (1 - a) * betas[step]
        slope = math.sqrt(1 - a) / (a * target.deviation**2 + 1 - a)  # epsilon = slope (z - sqrt(a) mean)
        gain = math.sqrt(b / a) * (1 - math.sqrt(1 - a) * slope) + math.sqrt(max(1 - b - sigma2, 0)) * slope
        shift = (math.sqrt(b / a) * math.sqrt(1 - a) - math.sqrt(max(1 - b - sigma2, 0))) * slope * math.sqrt(a)
        mean, variance = gain * mean + shift * target.mean, gain**2 * variance + sigma2
    assert float(z.mean()) == pytest.approx(mean, abs=0.015)
    assert float(z.std()) == pytest.approx(math.sqrt(variance), rel=0.02)
    assert mean == pytest.approx(target.mean, abs=0.02)
    assert math.sqrt(variance) == pytest.approx(target.deviation, rel=0.15)


def test_ddim_without_noise_follows_the_probability_flow(target):
    exact = target.mean + target.deviation * noise().next()
    errors = []
    for num_steps in (50, 200):
        z = ddim(target.epsilon(DIFFUSION), noise(), LABELS, DIFFUSION, num_steps=num_steps)
        errors.append(float((z - exact).abs().max()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 2.5


def test_ddim_at_eta_one_is_ddpm_with_the_posteriors_variance(target):
    def predict(z, t, labels):  # v = -1 chooses the posterior's variance
        return torch.cat([target.epsilon(DIFFUSION)(z, t, labels), -torch.ones_like(z)], dim=1)

    settings = (noise(), LABELS, DIFFUSION)
    torch.testing.assert_close(
        ddim(predict, *settings, num_steps=25, eta=1.0), ddpm(predict, noise(), LABELS, DIFFUSION, num_steps=25)
    )


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_equals_diffusers(eta):
    num_steps, generator = 20, generator_for(0, 0, NOISE_STREAM)
    taken, betas = respaced_betas(num_steps)
    scheduler = DDIMScheduler(
        num_train_timesteps=num_steps, trained_betas=betas, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(num_steps)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    for step in scheduler.timesteps:
        output = first_half(z, torch.tensor([taken[step]]), LABELS[:1])
        z = scheduler.step(output, int(step), z, eta=eta, generator=generator).prev_sample
    ours = ddim(first_half, noise(1, torch.float32, (4, 8, 8)), LABELS[:1], DIFFUSION, num_steps=num_steps, eta=eta)
    torch.testing.assert_close(ours, z, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("num_steps", [20, 250])
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_ddpm_equals_diffusers(variance_type, num_steps):
    predict = first_half if variance_type == "fixed_large" else curved
    generator = generator_for(0, 0, NOISE_STREAM)
    taken, betas = respaced_betas(num_steps)
    scheduler = DDPMScheduler(
        num_train_timesteps=num_steps, trained_betas=betas, clip_sample=False, variance_type=variance_type
    )
    scheduler.set_timesteps(num_steps)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    for step in scheduler.timesteps:
        output = predict(z, torch.tensor([taken[step]]), LABELS[:1])
        z = scheduler.step(output, int(step), z, generator=generator).prev_sample
    ours = ddpm(predict, noise(1, torch.float32, (4, 8, 8)), LABELS[:1], DIFFUSION, num_steps=num_steps)
    torch.testing.assert_close(ours, z, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_the_backbone_is_told_the_steps_of_training(target, sampler):
    steps = []
    sampler(target.epsilon(DIFFUSION), noise(2), LABELS[:2], DIFFUSION, num_steps=250, callback=steps.append)
    assert [step.step for step in steps] == list(range(250))
    times = [int(step.t[0]) for step in steps]
    assert times == respaced_betas(250)[0][::-1].tolist()
    assert (times[0], times[-1]) == (999, 0)
    assert torch.equal(steps[0].z, noise(2).next())


def test_the_callback_sees_the_expected_latent(target):
    steps = []
    ddim(target.epsilon(DIFFUSION), noise(2), LABELS[:2], DIFFUSION, num_steps=10, callback=steps.append)
    for step in steps:
        a = DIFFUSION.alphas_bar[step.t[0]].item()
        gain = math.sqrt(a) * target.deviation**2 / (a * target.deviation**2 + 1 - a)
        torch.testing.assert_close(step.denoised, target.mean + gain * (step.z - math.sqrt(a) * target.mean))


def test_ddim_ignores_learned_variances(target):
    plain = ddim(first_half, noise(2), LABELS[:2], DIFFUSION, num_steps=5)
    assert torch.equal(plain, ddim(curved, noise(2), LABELS[:2], DIFFUSION, num_steps=5))


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="1001"):
        ddpm(curved, noise(), LABELS, DIFFUSION, num_steps=1001)
    for eta in (-0.1, 1.1):
        with pytest.raises(UserError, match="eta"):
            ddim(curved, noise(), LABELS, DIFFUSION, eta=eta)
