"""A Gaussian data distribution, for which every prediction, flow and marginal can be written down."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.generators.interpolant import Interpolant


@dataclass(frozen=True)
class GaussianTarget:
    """Every number of the data's latents is N(mean, deviation^2)."""

    mean: float = 0.7
    deviation: float = 0.4

    def output(self, interpolant: Interpolant):
        """Return the exact backbone, in the interpolant's kind of prediction; elementwise."""

        def predict(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            alpha, sigma, d_alpha, d_sigma = (part[:, None, None, None] for part in interpolant.coefficients(t))
            centred = (z - alpha * self.mean) / ((alpha * self.deviation).square() + sigma.square())
            start, noise = self.mean + alpha * self.deviation**2 * centred, sigma * centred
            if interpolant.prediction == "velocity":
                return d_alpha * start + d_sigma * noise
            return noise if interpolant.prediction == "noise" else -centred

        return predict

    def moments(self, interpolant: Interpolant, t: float) -> tuple[float, float]:
        """Return mean and standard deviation at time t."""
        path = interpolant.coefficients(torch.tensor(t, dtype=torch.float64))
        return float(path.alpha) * self.mean, math.hypot(float(path.alpha) * self.deviation, float(path.sigma))

    def flow(self, interpolant: Interpolant, z: Tensor) -> Tensor:
        """Carry latents along the probability flow, from where sampling starts to where it ends."""
        (mean, deviation), (end_mean, end_deviation) = (
            self.moments(interpolant, t) for t in interpolant.sampling_times()
        )
        return end_mean + end_deviation * (z - mean) / deviation

    def epsilon(self, diffusion: GaussianDiffusion):
        """Return the exact epsilon prediction; `diffusion` is the process of training."""

        def predict(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            alpha_bar = diffusion.alphas_bar.to(z.dtype)[t][:, None, None, None]
            variance = alpha_bar * self.deviation**2 + 1 - alpha_bar
            return (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * self.mean) / variance

        return predict


@pytest.fixture
def target() -> GaussianTarget:
    return GaussianTarget()
