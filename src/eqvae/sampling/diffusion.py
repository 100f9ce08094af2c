"""Samplers of a diffusion: DDPM (arXiv:2006.11239) and DDIM (arXiv:2010.02502), on a subset of the steps.

Nothing is clipped: latents have no range.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.diffusion import GaussianDiffusion, ModelPosterior, StepSpacing
from eqvae.generators.protocol import Predict
from eqvae.sampling.noise import Callback, ImageNoise, SamplingStep, ask


@torch.no_grad()
def ddpm(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    diffusion: GaussianDiffusion,
    *,
    num_steps: int = 250,
    spacing: StepSpacing = "even",
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample by ancestral steps (Algorithm 2 of DDPM), with the variances that the backbone learned if it did.

    `predict` is asked for epsilon, and perhaps variances, at `num_steps` (250 in DiT) of the steps 0 ... 999 of
    training; a UserError says if the process has not so many.
    """

    def step(posterior: ModelPosterior, index: int) -> tuple[Tensor, Tensor]:
        return posterior.mean, (0.5 * posterior.log_variance).exp()

    return _reverse(predict, noise, labels, diffusion.respaced(num_steps, spacing), step, callback)


@torch.no_grad()
def ddim(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    diffusion: GaussianDiffusion,
    *,
    num_steps: int = 250,
    eta: float = 0.0,
    spacing: StepSpacing = "even",
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample by DDIM's steps (Equations 12 and 16 of DDIM), spaced as in `ddpm`; learned variances are ignored.

    `eta` is the share of DDPM's noise: 0 is deterministic, 1 has the posterior's variance.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"DDIM's eta is {eta}", "Choose it from 0 (deterministic) to 1 (DDPM's noise)")
    process = diffusion.respaced(num_steps, spacing)

    def step(posterior: ModelPosterior, index: int) -> tuple[Tensor, float | None]:
        alpha_bar = process.alphas_bar_previous[index].item()
        variance = eta**2 * process.posterior_variances[index].item()
        # At eta = 1 and the first step of training, rounding could leave a negative number of the order 1e-17.
        mean = alpha_bar**0.5 * posterior.start + max(1 - alpha_bar - variance, 0.0) ** 0.5 * posterior.noise
        return mean, variance**0.5 if eta > 0 else None

    return _reverse(predict, noise, labels, process, step, callback)


def _reverse(
    predict: Predict,
    noise: ImageNoise,
    labels: Tensor,
    process: GaussianDiffusion,
    step: Callable[[ModelPosterior, int], tuple[Tensor, Tensor | float | None]],
    callback: Callback | None,
) -> Tensor:
    """Go from noise to data; `step` gives the mean and the deviation, if any, of the latents one step earlier."""
    z = noise.next()
    labels = labels.to(z.device)
    for index in reversed(range(process.num_steps)):
        t = torch.full((len(z),), index, device=z.device)
        times = process.model_times(t)
        posterior = process.model_posterior(ask(predict, z, times, labels), z, t)
        if callback:
            callback(SamplingStep(step=process.num_steps - 1 - index, t=times, z=z, denoised=posterior.start))
        z, deviation = step(posterior, index)
        if index > 0 and deviation is not None:
            z = z + deviation * noise.next()
    return z
