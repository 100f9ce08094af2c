"""Stochastic interpolants as SiT trains them: Ma et al., arXiv:2401.08740.

    z_t = alpha(t) z + sigma(t) epsilon
    v(z_t, t) = alpha'(t) E[z | z_t] + sigma'(t) E[epsilon | z_t]        velocity of the probability-flow ODE
    s(z_t, t) = -E[epsilon | z_t] / sigma(t)                             score, the gradient of log p_t

Two directions of time are in use. In the paper, and in REPA's code and checkpoints, t = 0 is data and t = 1 noise; in
SiT's code and checkpoints t = 1 is data and t = 0 noise. Here every t is the one that the backbone sees, and
`Interpolant.time_of_data` says which; velocities are derivatives with respect to this t. The default is the paper's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.protocol import Coupling, LatentSpecification, Loss, Objective, Predict, drop_labels

Path = Literal["linear", "gvp", "vp"]
Prediction = Literal["velocity", "score", "noise"]
LossWeight = Literal["none", "velocity", "likelihood"]


@dataclass(frozen=True, kw_only=True)
class SitConfig:
    """How SiT is trained, and REPA with it."""

    owner: ClassVar[str] = "SiT"

    path: Path = "linear"
    """SiT: how data and noise are interpolated."""

    prediction: Prediction = "velocity"
    """SiT: what the network predicts."""

    loss_weight: LossWeight = "none"
    """SiT: weight of the score or noise loss over time."""


class Coefficients(NamedTuple):
    """The path and its derivatives with respect to t, in one shape."""

    alpha: Tensor
    sigma: Tensor
    alpha_derivative: Tensor
    sigma_derivative: Tensor

    @property
    def wronskian(self) -> Tensor:
        """`alpha sigma' - sigma alpha'`: never zero; positive where t grows towards noise."""
        return self.alpha * self.sigma_derivative - self.sigma * self.alpha_derivative


@dataclass(frozen=True, kw_only=True)
class Interpolant:
    """A path between data and noise, what the backbone predicts on it, and the conversions between predictions.

    An output with twice the latents' channels, as published SiT models have, counts with its first half.
    """

    path: Path = "linear"
    """Linear: `alpha = 1 - t`; GVP: `cos(pi t / 2)`; VP: DDPM's variance-preserving path in continuous time."""

    prediction: Prediction = "velocity"
    """What the backbone's output is."""

    time_of_data: Literal[0, 1] = 0
    """The t at which there is no noise: 0 in the paper and in REPA's checkpoints, 1 in SiT's."""

    beta_min: float = 0.1
    """Of the VP path, as in SiT's code."""

    beta_max: float = 20.0
    """Of the VP path, as in SiT's code."""

    def coefficients(self, t: Float[Tensor, "*shape"]) -> Coefficients:
        """Evaluate alpha, sigma and their derivatives."""
        u = t if self.time_of_data == 0 else 1 - t
        if self.path == "linear":
            alpha, sigma, d_alpha, d_sigma = 1 - u, u, -torch.ones_like(u), torch.ones_like(u)
        elif self.path == "gvp":
            alpha, sigma = torch.cos(u * math.pi / 2), torch.sin(u * math.pi / 2)
            d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
        else:
            spread = self.beta_max - self.beta_min
            log_alpha, d_log_alpha = -u.square() * spread / 4 - u * self.beta_min / 2, -(u * spread + self.beta_min) / 2
            alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
            d_alpha, d_sigma = alpha * d_log_alpha, -alpha.square() * d_log_alpha / sigma
        direction = 1 if self.time_of_data == 0 else -1
        return Coefficients(alpha, sigma, direction * d_alpha, direction * d_sigma)

    def add_noise(
        self, z: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], t: Float[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """Interpolate between latents and noise."""
        path = self._at(t)
        return path.alpha * z + path.sigma * noise

    def target_velocity(
        self, z: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], t: Float[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """The derivative of `add_noise` with respect to t."""
        path = self._at(t)
        return path.alpha_derivative * z + path.sigma_derivative * noise

    def velocity(
        self, output: Float[Tensor, "n c2 h w"], z: Float[Tensor, "n c h w"], t: Float[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """The velocity of the probability-flow ODE `dz = v(z, t) dt`."""
        if self.prediction == "velocity":
            return output[:, : z.shape[1]]
        path = self._at(t)
        return (path.alpha_derivative * z + path.wronskian * self.noise(output, z, t)) / path.alpha

    def noise(
        self, output: Float[Tensor, "n c2 h w"], z: Float[Tensor, "n c h w"], t: Float[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """The expected noise, E[epsilon | z]."""
        path, output = self._at(t), output[:, : z.shape[1]]
        if self.prediction == "noise":
            return output
        if self.prediction == "score":
            return -path.sigma * output
        return (path.alpha * output - path.alpha_derivative * z) / path.wronskian

    def score(
        self, output: Float[Tensor, "n c2 h w"], z: Float[Tensor, "n c h w"], t: Float[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """The score, the gradient of log p_t at z: `-E[epsilon | z] / sigma`."""
        if self.prediction == "score":
            return output[:, : z.shape[1]]
        return -self.noise(output, z, t) / self._at(t).sigma

    def denoised(
        self, output: Float[Tensor, "n c2 h w"], z: Float[Tensor, "n c h w"], t: Float[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """The expected latent without noise, E[z_data | z]."""
        path = self._at(t)
        if self.prediction == "velocity":
            return (path.sigma_derivative * z - path.sigma * output[:, : z.shape[1]]) / path.wronskian
        return (z - path.sigma * self.noise(output, z, t)) / path.alpha

    def training_times(self) -> tuple[float, float]:
        """The smallest and the largest t to train on; ends where a prediction would be infinite are cut as in SiT."""
        epsilon = 1e-5 if self.path == "vp" else 1e-3
        near_data, near_noise = self._cut(epsilon, cut_noise_end=False, cut_data_end=False)
        return min(near_data, near_noise), max(near_data, near_noise)

    def sampling_times(self, *, cut_noise_end: bool = False, cut_data_end: bool = False) -> tuple[float, float]:
        """Where a sampler starts and ends: 1e-3 away from an end at which it would divide by zero, as in SiT."""
        near_data, near_noise = self._cut(1e-3, cut_noise_end=cut_noise_end, cut_data_end=cut_data_end)
        return near_noise, near_data

    def _cut(self, epsilon: float, *, cut_noise_end: bool, cut_data_end: bool) -> tuple[float, float]:
        infinite_at_both = self.path != "vp" and self.prediction != "velocity"
        near_data = epsilon if cut_data_end or infinite_at_both or self.path == "vp" else 0.0
        near_noise = 1.0 - epsilon if cut_noise_end or infinite_at_both else 1.0
        return (near_data, near_noise) if self.time_of_data == 0 else (1.0 - near_data, 1.0 - near_noise)

    def _at(self, t: Tensor) -> Coefficients:
        return self.coefficients(t[:, None, None, None])


@dataclass(frozen=True, kw_only=True)
class InterpolantObjective(Objective):
    """The squared error of the backbone's prediction on an interpolant (Section 2 of SiT)."""

    num_classes: int
    """Of the latents; dropped labels become this."""

    interpolant: Interpolant = Interpolant()
    """The path and the prediction."""

    weight: LossWeight = "none"
    """Score and noise prediction only: `velocity` makes the loss that of the velocity, `likelihood` the bound of
    Song et al., arXiv:2101.09258."""

    doubled_output: bool = False
    """The backbone outputs 2c channels, the second half ignored, as the published SiT models do."""

    label_dropout: float = 0.1
    """Probability of training without the label."""

    def __post_init__(self) -> None:
        if self.weight != "none" and self.interpolant.prediction == "velocity":
            raise UserError(f"the loss weight '{self.weight}' is for score or noise prediction", "Choose 'none'")

    def coupling(self) -> Coupling:
        """See `Objective`: a score, too, is noise but for a factor."""
        times = self.times((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
        path = self.interpolant.coefficients(times)
        if self.interpolant.prediction == "velocity":
            return Coupling.of(path.alpha, path.sigma, path.alpha_derivative, path.sigma_derivative)
        return Coupling.of(path.alpha, path.sigma, torch.zeros_like(times), torch.ones_like(times))

    def out_channels(self, channels: int) -> int:
        return 2 * channels if self.doubled_output else channels

    def draw(self, num: int, specification: LatentSpecification, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw uniform numbers `t` for the times, `noise`, and `drop` for the labels; see `Objective`."""
        return {
            "t": torch.rand(num, generator=generator),
            "noise": torch.randn(num, *specification.shape, generator=generator),
            "drop": torch.rand(num, generator=generator),
        }

    def times(self, uniform: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Map uniform numbers to the times of a training step."""
        smallest, largest = self.interpolant.training_times()
        return smallest + (largest - smallest) * uniform

    def loss(
        self,
        predict: Predict,
        latents: Float[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"],
        draws: Mapping[str, Tensor],
    ) -> Loss:
        """Compute the weighted squared error of the prediction; see `Objective`."""
        interpolant, noise, t = self.interpolant, draws["noise"], self.times(draws["t"])
        seen = drop_labels(labels, draws["drop"], probability=self.label_dropout, null_label=self.num_classes)
        z_t = interpolant.add_noise(latents, noise, t)
        output = predict(z_t, t, seen).to(z_t.dtype)[:, : latents.shape[1]]
        if interpolant.prediction == "velocity":
            error = output - interpolant.target_velocity(latents, noise, t)
        elif interpolant.prediction == "noise":
            error = output - noise
        else:  # times sigma, as SiT's code has it, so that the target stays finite
            error = interpolant.coefficients(t).sigma[:, None, None, None] * output + noise
        mse = error.square().flatten(1).mean(1)
        return Loss(total=self._weights(t) * mse, parts={"mse": mse})

    def _weights(self, t: Tensor) -> Tensor:
        path = self.interpolant.coefficients(t)
        if self.weight == "velocity":
            return (path.wronskian / path.alpha).square()
        if self.weight == "likelihood":
            return path.wronskian.abs() / (path.alpha * path.sigma)
        return torch.ones_like(t)
