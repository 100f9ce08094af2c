"""Diffusion: every quantity against its closed form, computed independently in NumPy and float64."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from eqvae.errors import UserError
from eqvae.generators.diffusion import (
    DiffusionObjective,
    GaussianDiffusion,
    discretized_log_likelihood,
    gaussian_kl,
    linear_betas,
)
from eqvae.generators.protocol import LatentSpecification

SPECIFICATION = LatentSpecification(channels=2, height=3, width=5, num_classes=7)
T = (0, 1, 2, 499, 998, 999)


def _latents(num: int = len(T), seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num, 2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _numpy_schedule(num_steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    betas = np.linspace(1e-4, 0.02, num_steps) * 1000 / num_steps
    return betas, np.cumprod(1 - betas)


def _column(values: np.ndarray) -> np.ndarray:
    return values[:, None, None, None]


def test_the_linear_schedule_is_stretched_for_other_numbers_of_steps():
    betas = linear_betas()
    assert betas.dtype == torch.float64
    assert betas[[0, -1]].tolist() == [1e-4, 0.02]
    assert GaussianDiffusion(betas=linear_betas(2000)).alphas_bar[-1].log().item() == pytest.approx(
        GaussianDiffusion().alphas_bar[-1].log().item(), rel=0.02
    )


def test_betas_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="beta"):
        GaussianDiffusion(betas=torch.tensor([0.5, 1.5], dtype=torch.float64))


def test_noise_is_added_as_equation_4_says():
    betas, alphas_bar = _numpy_schedule()
    z, noise, t = _latents(), _latents(seed=1), torch.tensor(T)
    expected = (
        np.sqrt(_column(alphas_bar[list(T)])) * z.numpy() + np.sqrt(1 - _column(alphas_bar[list(T)])) * noise.numpy()
    )
    np.testing.assert_allclose(GaussianDiffusion().add_noise(z, noise, t).numpy(), expected, rtol=1e-12)
    assert betas[0] == 1e-4


def test_the_start_is_solved_for():
    diffusion, z, noise, t = GaussianDiffusion(), _latents(), _latents(seed=1), torch.tensor(T)
    z_t = diffusion.add_noise(z, noise, t)
    assert torch.allclose(diffusion.predict_start(z_t, t, noise), z)


def test_the_posterior_is_bayes_rule():
    betas, alphas_bar = _numpy_schedule()
    z, z_t, t = _latents(), _latents(seed=1), torch.tensor(T)
    posterior = GaussianDiffusion().posterior(z, z_t, t)
    for row, step in enumerate(T):
        if step == 0:  # the step before the first is the latent itself
            assert torch.allclose(posterior.mean[row], z[row])
            assert posterior.variance[row].item() == 0.0
            assert posterior.log_variance[row].item() == pytest.approx(GaussianDiffusion().posterior_variances[1].log())
            continue
        # N(z_{t-1}; root(alphas_bar[t-1]) z, 1 - alphas_bar[t-1]) times N(z_t; root(1 - beta) z_{t-1}, beta)
        prior_precision, likelihood_precision = 1 / (1 - alphas_bar[step - 1]), (1 - betas[step]) / betas[step]
        variance = 1 / (prior_precision + likelihood_precision)
        mean = variance * (
            prior_precision * math.sqrt(alphas_bar[step - 1]) * z[row].numpy()
            + likelihood_precision * z_t[row].numpy() / math.sqrt(1 - betas[step])
        )
        np.testing.assert_allclose(posterior.mean[row].numpy(), mean, rtol=1e-9)
        assert posterior.variance[row].item() == pytest.approx(variance, rel=1e-9)
        assert posterior.log_variance[row].item() == pytest.approx(math.log(variance), rel=1e-9)


def test_the_models_variance_lies_between_the_posteriors_and_beta():
    diffusion, z_t, t = GaussianDiffusion(), _latents(), torch.tensor(T)
    noise = _latents(seed=1)
    for v, expected in ((-1.0, diffusion.posterior_variances), (1.0, diffusion.betas)):
        model = diffusion.model_posterior(torch.cat([noise, torch.full_like(noise, v)], 1), z_t, t)
        for row, step in enumerate(T[1:], start=1):
            assert torch.allclose(model.variance[row], expected[step])
    middle = diffusion.model_posterior(torch.cat([noise, torch.zeros_like(noise)], 1), z_t, t)
    geometric = (diffusion.posterior_variances * diffusion.betas).sqrt()
    assert torch.allclose(middle.variance[3], geometric[499])
    assert torch.equal(middle.noise, noise)
    assert torch.allclose(middle.start, diffusion.predict_start(z_t, t, noise))


def test_without_variance_channels_the_variance_is_beta():
    diffusion, z_t, t = GaussianDiffusion(), _latents(), torch.tensor(T)
    model = diffusion.model_posterior(_latents(seed=1), z_t, t)
    assert torch.allclose(model.variance.flatten()[1:], diffusion.betas[torch.tensor(T[1:])])
    assert model.variance[0].item() == diffusion.posterior_variances[1].item()
    assert torch.allclose(model.log_variance.exp(), model.variance)


def test_a_perfect_backbone_has_no_divergence():
    diffusion, z, noise, t = GaussianDiffusion(), _latents(), _latents(seed=1), torch.tensor(T)
    z_t = diffusion.add_noise(z, noise, t)
    perfect = torch.cat([noise, -torch.ones_like(noise)], 1)
    assert diffusion.variational_term(perfect, z, z_t, t)[1:].abs().max() < 1e-9
    worse = torch.cat([noise + 0.1, -torch.ones_like(noise)], 1)
    assert (diffusion.variational_term(worse, z, z_t, t)[1:] > 1e-6).all()


def test_the_variational_bound_agrees_with_numpy():
    num_steps = 30
    diffusion = GaussianDiffusion(betas=linear_betas(num_steps))
    betas, alphas_bar = _numpy_schedule(num_steps)
    z, noise, output = _latents(1), _latents(1, seed=1), torch.cat([_latents(1, seed=2), _latents(1, seed=3)], 1)
    total = 0.0
    for step in range(num_steps):
        t = torch.tensor([step])
        total += diffusion.variational_term(output, z, diffusion.add_noise(z, noise, t), t).item()

    x, e, (eps, v) = z.numpy(), noise.numpy(), (half.numpy() for half in output.chunk(2, 1))

    def divergence(mean, variance, other_mean, other_variance):
        return 0.5 * (np.log(other_variance / variance) + (variance + (mean - other_mean) ** 2) / other_variance - 1)

    previous = np.append(1.0, alphas_bar[:-1])
    posterior_variances = betas * (1 - previous) / (1 - alphas_bar)
    expected = 0.0
    for step in range(num_steps):
        z_t = np.sqrt(alphas_bar[step]) * x + np.sqrt(1 - alphas_bar[step]) * e
        start = (z_t - np.sqrt(1 - alphas_bar[step]) * eps) / np.sqrt(alphas_bar[step])
        weights = (
            betas[step] * np.sqrt(previous[step]) / (1 - alphas_bar[step]),
            (1 - previous[step]) * np.sqrt(1 - betas[step]) / (1 - alphas_bar[step]),
        )
        smallest = posterior_variances[max(step, 1)]
        model_mean = weights[0] * start + weights[1] * z_t
        model_variance = betas[step] ** ((v + 1) / 2) * smallest ** ((1 - v) / 2)
        if step > 0:
            true_mean = weights[0] * x + weights[1] * z_t
            expected += divergence(true_mean, posterior_variances[step], model_mean, model_variance).mean()
        else:
            expected += -_binned(x, model_mean, np.sqrt(model_variance)).mean()
    assert total == pytest.approx(expected / math.log(2), rel=1e-9)


def _binned(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The published likelihood of 8-bit pixels, tanh approximation included."""

    def cumulative(y):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    upper = np.where(x > 0.999, 1.0, cumulative((x - mean + 1 / 255) / std))
    lower = np.where(x < -0.999, 0.0, cumulative((x - mean - 1 / 255) / std))
    return np.log(np.maximum(upper - lower, 1e-12))


def test_the_binned_likelihood_is_nearly_a_gaussians():
    pixels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(1, 1, 16, 16)
    mean, log_std = torch.full_like(pixels, 0.3), torch.full((1, 1, 1, 1), math.log(0.05), dtype=torch.float64)
    probability = discretized_log_likelihood(pixels, mean, log_std).exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-6)
    exact = stats.norm.cdf(pixels.numpy() + 1 / 255, 0.3, 0.05) - stats.norm.cdf(pixels.numpy() - 1 / 255, 0.3, 0.05)
    np.testing.assert_allclose(probability.numpy(), exact, atol=1e-4)


def test_the_divergence_of_gaussians():
    zero = torch.zeros(())
    assert gaussian_kl(zero, zero, zero, zero).item() == 0.0
    assert gaussian_kl(torch.tensor(3.0), zero, zero, zero).item() == pytest.approx(4.5)
    expected = 0.5 * (4.0 - 1 - math.log(4.0))
    assert gaussian_kl(zero, torch.tensor(math.log(4.0)), zero, zero).item() == pytest.approx(expected)


@pytest.mark.parametrize("num_steps", [2, 10, 50, 250, 1000])
def test_respacing_keeps_the_noise_levels(num_steps):
    diffusion = GaussianDiffusion()
    respaced = diffusion.respaced(num_steps)
    assert respaced.num_steps == num_steps
    assert respaced.timesteps.tolist() == np.round(np.linspace(0, 999, num_steps)).astype(int).tolist()
    assert torch.allclose(respaced.alphas_bar, diffusion.alphas_bar[respaced.timesteps], rtol=1e-9)
    t = torch.tensor([0, num_steps - 1])
    assert respaced.model_times(t).tolist() == [0, 999]


def test_respacing_twice_still_tells_the_backbone_the_original_times():
    twice = GaussianDiffusion().respaced(10).respaced(2)
    assert twice.timesteps.tolist() == [0, 999]


def test_a_single_step_starts_from_noise():
    single = GaussianDiffusion().respaced(1)
    assert single.timesteps.tolist() == [999]
    z_t, t = _latents(2), torch.zeros(2, dtype=torch.int64)
    model = single.model_posterior(torch.zeros(2, 4, 3, 5, dtype=torch.float64), z_t, t)
    assert torch.allclose(model.mean, model.start)
    assert model.log_variance.isfinite().all()


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_more_steps_than_there_are_cannot_be_taken(num_steps):
    with pytest.raises(UserError, match=f"{num_steps} steps can't be taken of 1000"):
        GaussianDiffusion().respaced(num_steps)


def test_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        assert GaussianDiffusion().betas.device.type == "cpu"


def _objective(**changes) -> DiffusionObjective:
    return DiffusionObjective(num_classes=7, diffusion=GaussianDiffusion(), **changes)


def test_draws_have_one_row_for_each_image():
    objective = _objective()
    draws = objective.draw(64, SPECIFICATION, torch.Generator().manual_seed(0))
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "t": (64,), "noise": (64, 2, 3, 5), "drop": (64,),
    }  # fmt: skip
    assert draws["t"].dtype == torch.int64
    assert 0 <= draws["t"].min() < 100 < 900 < draws["t"].max() <= 999
    again = objective.draw(64, SPECIFICATION, torch.Generator().manual_seed(0))
    assert all(torch.equal(draws[name], again[name]) for name in draws)


def test_the_loss_is_the_hybrid_of_equation_16():
    objective, diffusion = _objective(), GaussianDiffusion()
    z, t = _latents(dtype=torch.float32), torch.tensor(T)
    noise, v = _latents(seed=1, dtype=torch.float32), _latents(seed=2, dtype=torch.float32)
    seen = {}

    def predict(z_t, times, labels):
        seen.update(z=z_t, t=times, labels=labels)
        return torch.cat([0.5 * z_t, v], 1)

    labels = torch.arange(6)
    draws = {"t": t, "noise": noise, "drop": torch.tensor([0.0, 0.05, 0.1, 0.11, 0.5, 0.99])}
    loss = objective.loss(predict, z, labels, draws)
    z_t = diffusion.add_noise(z, noise, t)
    assert torch.equal(seen["z"], z_t)
    assert torch.equal(seen["t"], t)
    assert seen["labels"].tolist() == [7, 7, 2, 3, 4, 5]
    mse = (0.5 * z_t - noise).square().flatten(1).mean(1)
    vb = diffusion.variational_term(torch.cat([0.5 * z_t, v], 1), z, z_t, t)
    assert torch.allclose(loss.parts["mse"], mse)
    assert torch.allclose(loss.parts["vb"], vb)
    assert torch.allclose(loss.total, mse + vb)


def test_the_variational_term_does_not_move_the_mean():
    objective, z, t = _objective(), _latents(dtype=torch.float32), torch.tensor(T)
    output = torch.cat([_latents(seed=1), _latents(seed=2)], 1).float().requires_grad_()
    noise = _latents(seed=3, dtype=torch.float32)
    loss = objective.loss(
        lambda *_: output, z, torch.zeros(6, dtype=torch.int64), {"t": t, "noise": noise, "drop": torch.ones(6)}
    )
    (gradient,) = torch.autograd.grad(loss.total.sum(), output)
    assert torch.allclose(gradient[:, :2], 2 * (output[:, :2] - noise) / 30)
    assert (gradient[:, 2:].flatten(1).norm(dim=1) > 0).all()


def test_the_bound_of_a_shorter_process_weighs_as_much_as_the_paper_says():
    short = GaussianDiffusion(betas=linear_betas(100))
    objective = DiffusionObjective(num_classes=0, diffusion=short)
    draws = objective.draw(3, SPECIFICATION, torch.Generator().manual_seed(0))
    z = _latents(3, dtype=torch.float32)
    output = torch.zeros(3, 4, 3, 5)
    loss = objective.loss(lambda *_: output, z, torch.zeros(3, dtype=torch.int64), draws)
    assert torch.allclose(loss.total, loss.parts["mse"] + 0.1 * loss.parts["vb"])


def test_without_learned_variances_the_loss_is_the_error_of_the_noise():
    objective = _objective(learn_sigma=False)
    draws = objective.draw(200, SPECIFICATION, torch.Generator().manual_seed(0))
    z = _latents(200, dtype=torch.float32)
    loss = objective.loss(lambda z_t, *_: torch.zeros_like(z_t), z, torch.zeros(200, dtype=torch.int64), draws)
    assert set(loss.parts) == {"mse"}
    assert loss.total.mean().item() == pytest.approx(1.0, abs=0.05)
    assert (objective.out_channels(4), _objective().out_channels(4)) == (4, 8)
