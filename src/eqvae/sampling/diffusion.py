"""Samplers of a diffusion: DDPM (arXiv:2006.11239) and DDIM (arXiv:2010.02502), on an evenly spaced subset of steps.

Nothing is clipped: latents have no range.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.generators.protocol import Predict
from eqvae.sampling.noise import ImageNoise
from eqvae.sampling.step import Callback, SamplingStep, ask


@torch.no_grad()
def ddpm(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    diffusion: GaussianDiffusion,
    *,
    num_steps: int = 250,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample by ancestral steps (Algorithm 2 of DDPM), with the variances that the backbone learned if it did.

    Args:
        predict: Epsilon, and perhaps variances, at the steps 0 ... 999 of training.
        noise: Of this batch's images.
        labels: Their classes.
        diffusion: The process of training.
        num_steps: How many of its steps to take, each one call of `predict`; 250 in DiT.
        callback: Told before each step.

    Returns:
        Normalized latents.

    Raises:
        UserError: If the process has not so many steps.
    """
    process = diffusion.respaced(num_steps)
    z = noise.next()
    labels = labels.to(z.device)
    for step in range(num_steps):
        t = torch.full((len(z),), num_steps - 1 - step, device=z.device)
        times = process.model_times(t)
        posterior = process.model_posterior(ask(predict, z, times, labels), z, t)
        if callback:
            callback(SamplingStep(step=step, t=times, z=z, denoised=posterior.start))
        z = posterior.mean
        if step < num_steps - 1:
            z = z + (0.5 * posterior.log_variance).exp() * noise.next()
    return z


@torch.no_grad()
def ddim(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    diffusion: GaussianDiffusion,
    *,
    num_steps: int = 250,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample by DDIM's steps (Equations 12 and 16 of DDIM). The steps are spaced as in `ddpm`.

    Args:
        predict: Epsilon at the steps 0 ... 999 of training; learned variances are ignored.
        noise: Of this batch's images.
        labels: Their classes.
        diffusion: The process of training.
        num_steps: How many of its steps to take, each one call of `predict`.
        eta: Share of DDPM's noise: 0 is deterministic, 1 has the posterior's variance.
        callback: Told before each step.

    Returns:
        Normalized latents.

    Raises:
        UserError: If the process has not so many steps, or eta is outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"DDIM's eta is {eta}", "Choose it from 0 (deterministic) to 1 (DDPM's noise)")
    process = diffusion.respaced(num_steps)
    z = noise.next()
    labels = labels.to(z.device)
    for step in range(num_steps):
        index = num_steps - 1 - step
        t = torch.full((len(z),), index, device=z.device)
        times = process.model_times(t)
        posterior = process.model_posterior(ask(predict, z, times, labels), z, t)
        if callback:
            callback(SamplingStep(step=step, t=times, z=z, denoised=posterior.start))
        alpha_bar = process.alphas_bar_previous[index].item()
        variance = eta**2 * process.posterior_variances[index].item()
        # At eta = 1 and the first step of training, rounding could leave a negative number of the order 1e-17.
        z = alpha_bar**0.5 * posterior.start + max(1 - alpha_bar - variance, 0.0) ** 0.5 * posterior.noise
        if eta > 0 and index > 0:
            z = z + variance**0.5 * noise.next()
    return z
