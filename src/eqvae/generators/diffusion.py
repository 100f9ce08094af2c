"""DDPM as DiT trains it: linear betas, epsilon prediction, a learned range of variances with the variational term.

Ho et al., arXiv:2006.11239 (DDPM), and Nichol & Dhariwal, arXiv:2102.09672 (IDDPM); equation numbers name one of them.
Steps are counted from 0 as in the published code: `z_t` with t = 0 has been noised once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.protocol import Coupling, LatentSpecification, Loss, Objective, Predict, drop_labels
from eqvae.runtime.device import widest_float


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """What DiT's network may have; SiT and REPA, the same network, share it."""

    owner: ClassVar[str] = "DiT or SiT"

    qk_norm: bool = False
    """DiT, SiT: normalize queries and keys of the attention."""


StepSpacing = Literal["even", "ddim"]
"""Which steps of training a sampler takes."""


def linear_betas(num_steps: int = 1000) -> Float64[Tensor, " steps"]:
    """The linear schedule of DDPM, 1e-4 ... 0.02 for 1000 steps, stretched for other numbers of steps as in IDDPM."""
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A diagonal Gaussian over latents; its tensors broadcast to one shape."""

    mean: Float[Tensor, "n c h w"]

    variance: Float[Tensor, "n _ _ _"]

    log_variance: Float[Tensor, "n _ _ _"]
    """Nats; finite even where the variance is zero, see `GaussianDiffusion.posterior`."""


@dataclass(frozen=True, kw_only=True)
class ModelPosterior(Gaussian):
    """p(z_{t-1} | z_t), and what the backbone's output says of the noise-free latent."""

    start: Float[Tensor, "n c h w"]
    """The latent without noise, as predicted."""

    noise: Float[Tensor, "n c h w"]
    """Epsilon, as predicted."""


class GaussianDiffusion:
    """The forward process q and its posteriors (Equation 7 of DDPM); tables in float64.

    `timesteps` is what the backbone is told at each step: steps of the process that it was trained for.
    """

    def __init__(
        self, *, betas: Float64[Tensor, " steps"] | None = None, timesteps: Int64[Tensor, " steps"] | None = None
    ) -> None:
        self.betas = linear_betas() if betas is None else betas
        if not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError("a beta lies in (0, 1]")
        self.timesteps = torch.arange(len(self.betas), device="cpu") if timesteps is None else timesteps
        self.alphas_bar = torch.cumprod(1 - self.betas, 0)
        self.alphas_bar_previous = torch.cat([self.betas.new_ones(1), self.alphas_bar[:-1]])
        self.posterior_variances = self.betas * (1 - self.alphas_bar_previous) / (1 - self.alphas_bar)
        # The first posterior has no variance: as in the published code, its logarithm is the second's.
        clipped = self.posterior_variances.clone()
        clipped[0] = clipped[1] if len(clipped) > 1 else self.betas[0]
        self._tables = {
            "beta": self.betas,
            "root_alpha_bar": self.alphas_bar.sqrt(),
            "root_one_minus_alpha_bar": (1 - self.alphas_bar).sqrt(),
            "posterior_variance": self.posterior_variances,
            "posterior_log_variance": clipped.log(),
            "log_beta": self.betas.log(),
            "weight_of_start": self.betas * self.alphas_bar_previous.sqrt() / (1 - self.alphas_bar),
            "weight_of_noisy": (1 - self.alphas_bar_previous) * (1 - self.betas).sqrt() / (1 - self.alphas_bar),
            # What the published code calls "fixed large": beta, but the first posterior's clipped variance.
            "fixed_variance": torch.cat([clipped[:1], self.betas[1:]]),
        }
        self._tables_on: dict[torch.device, dict[str, Tensor]] = {}

    @property
    def num_steps(self) -> int:
        """T, the length of this process."""
        return len(self.betas)

    def respaced(self, num_steps: int, spacing: StepSpacing = "even") -> "GaussianDiffusion":
        """Take a subset of the steps, with the betas that keep each `alpha_bar` (Section 4 of IDDPM).

        `even`: from the first to the last step, as the published code's "250"; `ddim`: from the first on at whole
        strides, as its "ddim250", which leaves out the last.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise UserError(f"{num_steps} steps can't be taken of {self.num_steps}", f"Choose 1 ... {self.num_steps}")
        if spacing == "ddim":
            return self._take(torch.tensor(_strided(self.num_steps, num_steps)))
        stride = (self.num_steps - 1) / max(num_steps - 1, 1)
        kept, position = [], 0.0
        for _ in range(num_steps):  # DiT sums up strides: a product would round other steps where it ends in a half
            kept.append(round(position))
            position += stride
        return self._take(torch.tensor(kept if num_steps > 1 else [self.num_steps - 1]))

    def _take(self, taken: Int64[Tensor, " kept"]) -> "GaussianDiffusion":
        alphas_bar = self.alphas_bar[taken]
        previous = torch.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])
        return GaussianDiffusion(betas=1 - alphas_bar / previous, timesteps=self.timesteps[taken])

    def model_times(self, t: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Translate steps of this process to what the backbone is told."""
        return self._on(t.device)["timesteps"][t]

    def add_noise(
        self, z: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], t: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """Sample q(z_t | z_0), Equation 4 of DDPM."""
        return self._at("root_alpha_bar", t, z) * z + self._at("root_one_minus_alpha_bar", t, z) * noise

    def predict_start(
        self, z_t: Float[Tensor, "n c h w"], t: Int64[Tensor, " n"], noise: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """Solve `add_noise` for z."""
        return (z_t - self._at("root_one_minus_alpha_bar", t, z_t) * noise) / self._at("root_alpha_bar", t, z_t)

    def posterior(self, z: Float[Tensor, "n c h w"], z_t: Float[Tensor, "n c h w"], t: Int64[Tensor, " n"]) -> Gaussian:
        """q(z_{t-1} | z_t, z_0), Equations 6 and 7 of DDPM."""
        return Gaussian(
            mean=self._at("weight_of_start", t, z_t) * z + self._at("weight_of_noisy", t, z_t) * z_t,
            variance=self._at("posterior_variance", t, z_t),
            log_variance=self._at("posterior_log_variance", t, z_t),
        )

    def model_posterior(
        self, output: Float[Tensor, "n c2 h w"], z_t: Float[Tensor, "n c h w"], t: Int64[Tensor, " n"]
    ) -> ModelPosterior:
        """p(z_{t-1} | z_t) of a backbone.

        With 2c channels the second half v, nominally in [-1, 1], chooses the variance between the posterior's and
        beta, in log space (Equation 15 of IDDPM); with c channels the variance is beta ("fixed large").
        """
        channels = z_t.shape[1]
        noise = output[:, :channels]
        start = self.predict_start(z_t, t, noise)
        if output.shape[1] == channels:
            variance = self._at("fixed_variance", t, z_t)
            log_variance = variance.log()
        else:
            fraction = (output[:, channels:] + 1) / 2
            largest, smallest = self._at("log_beta", t, z_t), self._at("posterior_log_variance", t, z_t)
            log_variance = fraction * largest + (1 - fraction) * smallest
            variance = log_variance.exp()
        mean = self.posterior(start, z_t, t).mean
        return ModelPosterior(mean=mean, variance=variance, log_variance=log_variance, start=start, noise=noise)

    def variational_term(
        self,
        output: Float[Tensor, "n c2 h w"],
        z: Float[Tensor, "n c h w"],
        z_t: Float[Tensor, "n c h w"],
        t: Int64[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """L_t of the variational bound (Equations 4 to 7 of IDDPM).

        L_0 is the likelihood of 8-bit pixels in [-1, 1], though z is a latent: so DiT was trained.
        """
        true, model = self.posterior(z, z_t, t), self.model_posterior(output, z_t, t)
        divergence = gaussian_kl(true.mean, true.log_variance, model.mean, model.log_variance)
        decoder = -discretized_log_likelihood(z, model.mean, 0.5 * model.log_variance)
        nats = torch.where(t == 0, decoder.flatten(1).mean(1), divergence.flatten(1).mean(1))
        return nats / math.log(2)

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._tables_on:  # kept: a copy at each step would make an accelerator wait
            tables = {name: table.to(widest_float(device)) for name, table in self._tables.items()}
            tables["timesteps"] = self.timesteps
            self._tables_on[device] = {name: table.to(device) for name, table in tables.items()}
        return self._tables_on[device]

    def _at(self, name: str, t: Tensor, z: Tensor) -> Tensor:
        values = self._on(t.device)[name][t]
        return values.to(torch.promote_types(z.dtype, torch.float32))[:, None, None, None]


def _strided(num_steps: int, wanted: int) -> list[int]:
    """Find the whole stride that takes so many steps."""
    for stride in range(1, num_steps + 1):
        if len(taken := range(0, num_steps, stride)) == wanted:
            return list(taken)
    counts = [len(range(0, num_steps, stride)) for stride in range(1, num_steps)]
    nearest = min(counts, key=lambda count: abs(count - wanted))
    raise UserError(f"no whole stride takes {wanted} of {num_steps} steps", f"{nearest} are near, or space them evenly")


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


@dataclass(frozen=True, kw_only=True)
class DiffusionObjective(Objective):
    """L_hybrid of IDDPM (Equation 16): the error of epsilon, and the variational term for the variances alone."""

    num_classes: int
    """Of the latents; dropped labels become this."""

    diffusion: GaussianDiffusion
    """The process."""

    learn_sigma: bool = True
    """Whether the backbone also predicts the variances, with c channels of its own."""

    label_dropout: float = 0.1
    """Probability of training without the label."""

    def coupling(self) -> Coupling:
        alphas_bar = self.diffusion.alphas_bar
        zero, one = torch.zeros_like(alphas_bar), torch.ones_like(alphas_bar)  # epsilon is what is predicted
        return Coupling.of(alphas_bar.sqrt(), (1 - alphas_bar).sqrt(), zero, one)

    def out_channels(self, channels: int) -> int:
        return 2 * channels if self.learn_sigma else channels

    def draw(self, num: int, specification: LatentSpecification, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw steps `t`, `noise`, and `drop` for the labels; see `Objective`."""
        return {
            "t": torch.randint(self.diffusion.num_steps, (num,), generator=generator),
            "noise": torch.randn(num, *specification.shape, generator=generator),
            "drop": torch.rand(num, generator=generator),
        }

    def loss(
        self,
        predict: Predict,
        latents: Float[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"],
        draws: Mapping[str, Tensor],
    ) -> Loss:
        """Compute `mse` and, with learned variances, `vb` in bits per dimension; see `Objective`.

        Equation 16 weighs the bound, a sum over T steps, by 0.001: that is T / 1000 for the term of one random step, 1
        for DiT's 1000 steps.
        """
        diffusion, t, noise = self.diffusion, draws["t"], draws["noise"]
        seen = drop_labels(labels, draws["drop"], probability=self.label_dropout, null_label=self.num_classes)
        z_t = diffusion.add_noise(latents, noise, t)
        output = predict(z_t, diffusion.model_times(t), seen).to(z_t.dtype)
        epsilon, variance = output[:, : latents.shape[1]], output[:, latents.shape[1] :]
        mse = (noise - epsilon).square().flatten(1).mean(1)
        if not self.learn_sigma:
            return Loss(total=mse, parts={"mse": mse})
        frozen_mean = torch.cat([epsilon.detach(), variance], dim=1)  # "stop-gradient on the mean"
        vb = diffusion.variational_term(frozen_mean, latents, z_t, t)
        return Loss(total=mse + diffusion.num_steps / 1000 * vb, parts={"mse": mse, "vb": vb})
