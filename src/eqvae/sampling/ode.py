"""Samplers of an interpolant's probability-flow ODE, `dz = v(z, t) dt` from noise to data (Equation 2 of SiT).

Ma et al., arXiv:2401.08740. Time runs in the interpolant's own direction, and ends 1e-3 before data or begins 1e-3
after noise where the path or the prediction would divide by zero there, see `Interpolant.sampling_times`.

torchdiffeq, which SiT samples with, controls one step size by the error of the whole batch, so that an image depends
on its neighbours. In `dopri5` each image has its own time and step size, as if it were integrated alone, while the
backbone still sees a batch. Coefficients: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, Table
II.5.2; control: Section II.4 there, with SciPy's constants.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.protocol import Predict
from eqvae.sampling.guidance import decided_at
from eqvae.sampling.noise import Callback, ImageNoise, SamplingStep, ask

NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
"""Where in a step its seven slopes are taken; the seventh is the next step's first."""

STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Weights of the earlier slopes at each node; the last row is the solution of order 5."""

ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of the slopes in the difference between the solutions of order 5 and 4."""

SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Latents (m, c, h, w), their times (m,) and their rows (m,) in the batch to dz/dt (m, c, h, w)."""


@torch.no_grad()
def euler(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    interpolant: Interpolant,
    *,
    num_steps: int = 250,
    timestep_shift: float = 1.0,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample with `num_steps` Euler steps, of equal size unless shifted (see `shifted_times`): order 1.

    SiT's code counts the grid's points: one more.
    """
    grid = shifted_times(interpolant, num_steps, timestep_shift)
    return _fixed_steps(predict, noise, labels, interpolant, grid, callback, corrects=False)


@torch.no_grad()
def heun(
    predict: Predict,
    noise: ImageNoise,
    labels: Int64[Tensor, " n"],
    interpolant: Interpolant,
    *,
    num_steps: int = 125,
    timestep_shift: float = 1.0,
    callback: Callback | None = None,
) -> Float[Tensor, "n c h w"]:
    """Sample with Heun's steps, of equal size unless shifted: order 2, and `2 num_steps - 1` calls of `predict`.

    The last is Euler's, as in REPA's code and in Algorithm 1 of EDM (arXiv:2206.00364): the backbone is never asked
    at the data's end, where its noise level was hardly trained. The order is not changed by a single step. As in REPA's
    code, a guidance interval is asked at a step's beginning: its second slope is guided if its first is.
    """
    grid = shifted_times(interpolant, num_steps, timestep_shift)
    return _fixed_steps(predict, noise, labels, interpolant, grid, callback, corrects=True)


def shifted_times(interpolant: Interpolant, num_steps: int, shift: float = 1.0) -> list[float]:
    """Cut the way from noise to data into steps, `num_steps + 1` times.

    With p the share of the way, equal steps are moved to `shift p / (1 + (shift - 1) p)`, as LightningDiT samples
    (arXiv:2501.01423, whose checkpoints run to data at t = 1, with 0.3); its training draws times without a shift.
    """
    if num_steps < 1:
        raise UserError(f"An ODE can't be solved in {num_steps} steps", "Take at least 1")
    start, end = interpolant.sampling_times()
    if shift == 1.0:
        return torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()
    share = torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64)
    return (start + (end - start) * (shift * share / (1.0 + (shift - 1.0) * share))).tolist()


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

    `predict` is called six times a step, with fewer images when some have arrived. `rtol` and `atol`, the relative and
    absolute error of a step, are SiT's. A UserError says if the output is not finite or `max_num_steps` do not suffice.
    """
    if rtol <= 0 or atol <= 0:
        raise UserError(f"dopri5's tolerances are {rtol:g} and {atol:g}", "Give positive ones: SiT's are 1e-3 and 1e-6")
    start, end = interpolant.sampling_times()
    z = noise.next()
    labels = labels.to(z.device)

    def velocity(z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return interpolant.velocity(ask(predict, z, t, labels[rows]), z, t)

    def on_step(progress: _Progress) -> None:
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
    grid: list[float],
    callback: Callback | None,
    *,
    corrects: bool,
) -> Tensor:
    z = noise.next()
    labels = labels.to(z.device)
    for step, (now, following) in enumerate(pairwise(grid)):
        t, h = z.new_full((len(z),), now), following - now
        output = ask(predict, z, t, labels)
        if callback:
            callback(SamplingStep(step=step, t=t, z=z, denoised=interpolant.denoised(output, z, t)))
        slope = interpolant.velocity(output, z, t)
        if corrects and step < len(grid) - 2:
            ahead, t_next = z + h * slope, z.new_full((len(z),), following)
            as_before = decided_at(predict, now)
            slope = 0.5 * (slope + interpolant.velocity(ask(as_before, ahead, t_next, labels), ahead, t_next))
        z = z + h * slope
    return z


class _Progress(NamedTuple):
    """Where the images are before a step."""

    step: int
    t: Float64[Tensor, " n"]
    z: Float[Tensor, "n c h w"]
    slope: Float[Tensor, "n c h w"]
    """dz/dt at z and t."""


def integrate(
    velocity: Velocity,
    z: Float[Tensor, "n c h w"],
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    max_num_steps: int,
    on_step: Callable[[_Progress], None] = lambda _: None,
) -> Float[Tensor, "n c h w"]:
    """Integrate `dz/dt = velocity` for each image on its own.

    Images that have arrived leave the batch. Times and step sizes stay on the CPU in float64.
    """
    direction = 1.0 if end > start else -1.0
    t = torch.full((len(z),), start, dtype=torch.float64)
    everything = torch.arange(len(z))
    slope = velocity(z, t.to(z.device, z.dtype), everything.to(z.device))
    size = _first_sizes(velocity, z, t, slope, abs(end - start) * direction, rtol=rtol, atol=atol)
    was_rejected = torch.zeros(len(z), dtype=torch.bool)
    for step in range(max_num_steps):
        rows = everything[t != end]
        if len(rows) == 0:
            return z
        on_step(_Progress(step, t, z, slope))
        left = (end - t[rows]).abs()
        h = torch.minimum(size[rows], left)
        trial = _trial(velocity, z, t, slope, rows, h * direction)
        norms = _norms(trial.error, z[rows.to(z.device)], trial.z, rtol=rtol, atol=atol)
        if not norms.isfinite().all():
            where = float(t[rows][~norms.isfinite()][0])
            raise UserError(
                f"The generator's output is not finite near t = {where:.4g}", "Check its weights and its precision"
            )
        accepted = norms < 1.0
        factors = (SAFETY * norms.clamp(min=1e-12) ** -0.2).clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
        # A step that follows a rejected one does not grow; a rejected one always shrinks, as SAFETY < 1.
        size[rows] = h * torch.where(was_rejected[rows] & accepted, factors.clamp(max=1.0), factors)
        was_rejected[rows] = ~accepted
        done, arrived = rows[accepted], h[accepted] >= left[accepted]
        t = t.index_put((done,), torch.where(arrived, end, t[done] + h[accepted] * direction))
        kept, here = accepted.to(z.device), done.to(z.device)
        z, slope = z.index_put((here,), trial.z[kept]), slope.index_put((here,), trial.slope[kept])
    if (t == end).all():
        return z
    raise UserError(
        f"dopri5 did not arrive within {max_num_steps} steps", "Raise rtol, or take euler or heun with fixed steps"
    )


class _Trial(NamedTuple):
    z: Tensor
    slope: Tensor
    error: Tensor


def _trial(velocity: Velocity, z: Tensor, t: Tensor, slope: Tensor, rows: Tensor, h: Tensor) -> _Trial:
    """Make one step of signed size h with the images in `rows`."""
    here = rows.to(z.device)
    begin, scale = z[here], h.to(z.device, z.dtype)[:, None, None, None]
    slopes, now = [slope[here]], begin
    for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
        now = begin + scale * _weighted(weights, slopes)
        slopes.append(velocity(now, (t[rows] + node * h).to(z.device, z.dtype), here))
    return _Trial(now, slopes[-1], scale * _weighted(ERROR, slopes))


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total


def _norms(x: Tensor, *sizes: Tensor, rtol: float, atol: float) -> Tensor:
    """Return the root mean square over each image of `x / (atol + rtol max |size|)`.

    Image by image: one reduction over all of them may add in another order for another batch size.
    """
    largest = torch.stack([size.abs() for size in sizes]).amax(0)
    scaled = x / (atol + rtol * largest)
    norms = torch.stack([torch.linalg.vector_norm(image) for image in scaled])
    return norms.cpu().double() / x[0].numel() ** 0.5


def _first_sizes(
    velocity: Velocity, z: Tensor, t: Tensor, slope: Tensor, span: float, *, rtol: float, atol: float
) -> Tensor:
    """Guess each image's first step size from the size and the change of its slope (Hairer et al., Section II.4)."""
    d0 = _norms(z, z, rtol=rtol, atol=atol)
    d1 = _norms(slope, z, rtol=rtol, atol=atol)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(span))
    signed = h0 if span > 0 else -h0
    ahead = z + signed.to(z.device, z.dtype)[:, None, None, None] * slope
    rows = torch.arange(len(z), device=z.device)
    change = velocity(ahead, (t + signed).to(z.device, z.dtype), rows) - slope
    d2 = _norms(change, z, rtol=rtol, atol=atol) / h0
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * h0, h1).clamp(max=abs(span))
