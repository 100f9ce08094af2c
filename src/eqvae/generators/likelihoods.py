"""Likelihoods of Gaussians that the variational bound of a diffusion is made of."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of one diagonal Gaussian to another."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.exp() - 1 - ratio + (mean - other_mean).square() * (-other_log_variance).exp())


def discretized_log_likelihood(
    z: Float[Tensor, "n c h w"], mean: Float[Tensor, "n c h w"], log_std: Float[Tensor, "n _ _ _"]
) -> Float[Tensor, "n c h w"]:
    """Probability of 8-bit values under a Gaussian (Equation 13 of DDPM), with the published code's approximations."""

    def cumulative(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))

    centred, inverse_std = z - mean, (-log_std).exp()
    above, below = cumulative(inverse_std * (centred + 1 / 255)), cumulative(inverse_std * (centred - 1 / 255))
    probability = torch.where(z < -0.999, above, torch.where(z > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()
