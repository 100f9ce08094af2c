"""The posterior's formulas against torch.distributions."""

import torch
from torch.distributions import Normal, kl_divergence

from eqvae.autoencoders import Posterior


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance, noise = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(3))
    return mean, log_variance, noise


def test_kl_is_torch_distributions_own() -> None:
    mean, log_variance, _ = draw()
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(mean=mean, log_variance=log_variance).kl(), expected)


def test_sample_shifts_and_scales_the_noise() -> None:
    mean, log_variance, noise = draw()
    posterior = Posterior(mean=mean, log_variance=log_variance)
    torch.testing.assert_close(posterior.sample(noise), mean + log_variance.exp().sqrt() * noise)
    assert torch.equal(posterior.sample(torch.zeros_like(mean)), posterior.mode())


def test_a_deterministic_encoder_has_no_spread() -> None:
    mean, _, noise = draw()
    posterior = Posterior(mean=mean)
    assert torch.equal(posterior.sample(noise), mean)
    assert torch.equal(posterior.kl(), torch.zeros(3))
