"""The reverse-time SDE of an interpolant, with SiT's choices of its diffusion (Section 2.3 of arXiv:2401.08740).

    dz = (v(z, t) + w(t) s(z, t)) dt + sqrt(2 w(t)) dW        from noise to data, time counted towards data

has the interpolant's marginals for any w >= 0: w is free at sampling time. As in SiT's code, w here is half of the
paper's w_t. REPA samples with w = sigma(t) and a last step of 0.04: the defaults.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.protocol import Predict
from eqvae.sampling.noise import Callback, ImageNoise, SamplingStep, ask

DiffusionForm = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["mean", "euler", "tweedie", "none"]


def diffusion_coefficient(
    interpolant: Interpolant, t: Float[Tensor, " n"], form: DiffusionForm, norm: float | int = 1.0
) -> Float[Tensor, " n"]:
    """Evaluate w, with u the time from data: u = 0 at data, 1 at noise."""
    path, u = interpolant.coefficients(t), t if interpolant.time_of_data == 0 else 1 - t
    if form == "constant":
        return torch.full_like(t, norm)
    if form == "sbdm":
        return norm * path.sigma * path.wronskian.abs() / path.alpha
    if form == "sigma":
        return norm * path.sigma
    if form == "linear":
        return norm * u
    if form == "decreasing":
        return 0.25 * (1 - norm * torch.cos(math.pi * u)).square()
    return norm * torch.sin(math.pi * u).square()


@torch.no_grad()
def euler_maruyama(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    interpolant: Interpolant,
    *,
    num_steps: int = 250,
    diffusion_form: DiffusionForm = "sigma",
    diffusion_norm: float | int = 1.0,
    last_step: LastStep = "mean",
    last_step_size: float = 0.04,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample with Euler-Maruyama steps of equal size and a last one without noise.

    `num_steps` counts calls of `predict`, the last step's among them, as SiT and REPA do. The last step begins
    `last_step_size` before data, in (0, 1), and is `mean`: the SDE's step without its noise; `euler`: the ODE's;
    `tweedie`: the expected latent; or `none`: noisy steps up to 1e-3 before data. For the diffusion's form and norm,
    0 or more, see `diffusion_coefficient`.
    """
    grid = _grid(interpolant, num_steps, diffusion_form, last_step, last_step_size)
    if diffusion_norm < 0:
        raise UserError(f"The SDE's diffusion has the factor {diffusion_norm}", "Give 0 or more")
    z = noise.next()
    labels = labels.to(z.device)
    for step, (now, following) in enumerate(pairwise(grid)):
        t, h = z.new_full((len(z),), now), following - now
        output = ask(predict, z, t, labels)
        if callback:
            callback(SamplingStep(step=step, t=t, z=z, denoised=interpolant.denoised(output, z, t)))
        is_last = last_step != "none" and step == num_steps - 1
        if is_last and last_step == "tweedie":
            return interpolant.denoised(output, z, t)
        mean = z + h * interpolant.velocity(output, z, t)
        if is_last and last_step == "euler":
            return mean
        w = diffusion_coefficient(interpolant, t, diffusion_form, diffusion_norm)[:, None, None, None]
        mean = mean + abs(h) * w * interpolant.score(output, z, t)
        z = mean if is_last else mean + (2 * w * abs(h)).sqrt() * noise.next()
    return z


def _grid(
    interpolant: Interpolant, num_steps: int, form: DiffusionForm, last_step: LastStep, last_step_size: float
) -> list[float]:
    """Lay out `num_steps + 1` times from noise to data."""
    # The VP path's alpha is not zero at noise; with the others, w of score-based diffusion is infinite there.
    cut_noise_end = form == "sbdm" and interpolant.path != "vp"
    start, end = interpolant.sampling_times(cut_noise_end=cut_noise_end, cut_data_end=True)
    if last_step == "none":
        if num_steps < 1:
            raise UserError(f"An SDE can't be solved in {num_steps} steps", "Take at least 1")
        return torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()
    if num_steps < 2:
        raise UserError(f"{num_steps} steps do not suffice for an SDE with a last step", "Take at least 2")
    if not 0.0 < last_step_size < 1.0:
        raise UserError(f"The SDE's last step has the size {last_step_size}", "Choose one in (0, 1): SiT's is 0.04")
    data = float(interpolant.time_of_data)
    before = data + last_step_size if data == 0.0 else data - last_step_size
    return [*torch.linspace(start, before, num_steps, dtype=torch.float64).tolist(), data]
