"""Samplers of an interpolant's probability-flow ODE, `dz = v(z, t) dt` from noise to data (Equation 2 of SiT).

Ma et al., arXiv:2401.08740. Time runs in the interpolant's own direction, and ends 1e-3 before data or begins 1e-3
after noise where the path or the prediction would divide by zero there, see `Interpolant.sampling_times`.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.protocol import Predict
from eqvae.sampling.dormand_prince import Progress, integrate
from eqvae.sampling.noise import ImageNoise
from eqvae.sampling.step import Callback, SamplingStep, ask


@torch.no_grad()
def euler(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    interpolant: Interpolant,
    *,
    num_steps: int = 250,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample with Euler's steps of equal size: order 1.

    Args:
        predict: The backbone at times of the interpolant.
        noise: Of this batch's images.
        labels: Their classes.
        interpolant: What the backbone was trained on.
        num_steps: Steps, each one call of `predict`. (SiT's code counts the grid's points: one more.)
        callback: Told before each step.

    Returns:
        Normalized latents.

    Raises:
        UserError: If there is no step.
    """
    return _fixed_steps(predict, noise, labels, interpolant, num_steps, callback, corrects=False)


@torch.no_grad()
def heun(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    interpolant: Interpolant,
    *,
    num_steps: int = 125,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample with Heun's steps of equal size: order 2.

    The last is Euler's, as in REPA's code and in Algorithm 1 of EDM (arXiv:2206.00364): the backbone is never asked
    at the data's end, where its noise level was hardly trained. The order is not changed by a single step.

    Args:
        predict: The backbone at times of the interpolant.
        noise: Of this batch's images.
        labels: Their classes.
        interpolant: What the backbone was trained on.
        num_steps: Steps; `predict` is called `2 num_steps - 1` times.
        callback: Told before each step.

    Returns:
        Normalized latents.

    Raises:
        UserError: If there is no step.
    """
    return _fixed_steps(predict, noise, labels, interpolant, num_steps, callback, corrects=True)


@torch.no_grad()
def dopri5(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    interpolant: Interpolant,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_num_steps: int = 1000,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample with Dormand and Prince's pair and adaptive steps, a step size for each image: order 5.

    Args:
        predict: The backbone at times of the interpolant; called with fewer images when some have arrived.
        noise: Of this batch's images.
        labels: Their classes.
        interpolant: What the backbone was trained on.
        rtol: Relative error of a step; 1e-3 in SiT.
        atol: Absolute error of a step; 1e-6 in SiT.
        max_num_steps: Steps, each six calls of `predict`, after which to give up.
        callback: Told before each step.

    Returns:
        Normalized latents.

    Raises:
        UserError: If a tolerance is not positive, the output is not finite, or the steps do not suffice.
    """
    if rtol <= 0 or atol <= 0:
        raise UserError(f"dopri5's tolerances are {rtol:g} and {atol:g}", "Give positive ones: SiT's are 1e-3 and 1e-6")
    start, end = interpolant.sampling_times()
    z = noise.next()
    labels = labels.to(z.device)

    def velocity(z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return interpolant.velocity(ask(predict, z, t, labels[rows]), z, t)

    def on_step(progress: Progress) -> None:
        if callback:
            t = progress.t.to(z.device, z.dtype)
            # The solver knows slopes only, so the backbone's kind of prediction does not matter here.
            denoised = replace(interpolant, prediction="velocity").denoised(progress.slope, progress.z, t)
            callback(SamplingStep(step=progress.step, t=t, z=progress.z, denoised=denoised))

    return integrate(velocity, z, start, end, rtol=rtol, atol=atol, max_num_steps=max_num_steps, on_step=on_step)


def _fixed_steps(
    predict: Predict,
    noise: ImageNoise,
    labels: Tensor,
    interpolant: Interpolant,
    num_steps: int,
    callback: Callback | None,
    *,
    corrects: bool,
) -> Tensor:
    if num_steps < 1:
        raise UserError(f"An ODE can't be solved in {num_steps} steps", "Take at least 1")
    start, end = interpolant.sampling_times()
    grid = torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()
    z = noise.next()
    labels = labels.to(z.device)
    for step, (now, following) in enumerate(pairwise(grid)):
        t, h = z.new_full((len(z),), now), following - now
        output = ask(predict, z, t, labels)
        if callback:
            callback(SamplingStep(step=step, t=t, z=z, denoised=interpolant.denoised(output, z, t)))
        slope = interpolant.velocity(output, z, t)
        if corrects and step < num_steps - 1:
            ahead, t_next = z + h * slope, z.new_full((len(z),), following)
            slope = 0.5 * (slope + interpolant.velocity(ask(predict, ahead, t_next, labels), ahead, t_next))
        z = z + h * slope
    return z
