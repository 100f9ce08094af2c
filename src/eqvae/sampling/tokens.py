"""Samplers of a masked generator of tokens: all are hidden at first, and each step fills some of them for good.

`confidence` fills those of which the network is surest (MaskGIT, arXiv:2202.04200, Section 3.2), `halton` those whose
turn it is in an order that spreads them out (arXiv:2503.17076). With T steps, "progress" means t / (T - 1) for step
t = 0 ... T - 1, as in the code of Besnier & Chen (arXiv:2310.14400); a single step has progress 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.maskgit import PredictTokens, Schedule, StepRule, tokens_per_step
from eqvae.generators.protocol import LatentSpecification
from eqvae.sampling.noise import TokenNoise

_ROW_BASE, _COLUMN_BASE = 2, 3

GuidanceSchedule = Literal["constant", "linear"]
"""`linear`: the scale rises from 1, which is none, at the first step to its value at the last (Besnier & Chen)."""


@dataclass(frozen=True, kw_only=True)
class TokenDecoding:
    """How tokens are drawn, whichever of them a step fills."""

    num_steps: int
    """Steps, each one call of the network; 8 for 256 px, 15 for 512 px in Besnier & Chen, 32 with the Halton order."""

    schedule: Schedule = "arccos"
    """How many tokens the steps fill."""

    step_rule: StepRule | None = None
    """What the schedule says of a step. None: as published, `increments` for `confidence` (Besnier & Chen, whose counts
    with `arccos` are almost MaskGIT's own of `cosine` and `remaining`) and `remaining` for `halton`."""

    temperature: float | int = 1.0
    """Logits are divided by this. Besnier & Chen multiply: their 1.3 is 1 / 1.3 here."""

    top_k: int | None = None
    """Draw from the likeliest codes only; None: from all."""

    guidance_scale: float | int = 1.0
    """1 for none, as everywhere in `sampling.guidance`. Besnier & Chen's w is scale - 1: their 3 is 4 here."""

    guidance_schedule: GuidanceSchedule = "linear"
    """How the scale grows with progress."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"tokens are to be drawn in {self.num_steps} steps", "Give at least 1")
        if not self.temperature > 0:
            raise UserError(f"the temperature of tokens is {self.temperature}", "Give a positive one")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"tokens are to be drawn from the {self.top_k} likeliest codes", "Give at least 1")

    def scale_at(self, progress: float) -> float:
        """Say how strongly a step is guided."""
        if self.guidance_schedule == "constant":
            return float(self.guidance_scale)
        return 1.0 + (self.guidance_scale - 1.0) * progress


@dataclass(frozen=True, kw_only=True)
class TokenStep:
    """The state of a batch in one of a sampler's steps, before it fills what it chooses."""

    step: int
    """Counted from 0."""

    progress: float
    """0 at the first step, 1 at the last."""

    tokens: Int64[Tensor, "n h w"]
    """Those that are not filled are the mask."""

    proposal: Int64[Tensor, "n h w"]
    """Filled tokens, and for each other one a code: what a preview shows."""

    log_likelihood: Float[Tensor, "n h w"]
    """Of the proposed codes, under the distribution that they were drawn from; of no meaning where filled."""


TokenCallback = Callable[[TokenStep], None]

_Choose = Callable[[TokenStep, int, int], Tensor]
"""From a step, the number of tokens filled before it and the number to fill in it to their cells (n, number)."""


def classifier_free_token_guidance(predict: PredictTokens, scale: float | int, null_label: int) -> PredictTokens:
    """Guide logits away from the unconditional ones: `b + scale (a - b)`, as `sampling.guidance` guides latents."""
    if scale == 1.0:
        return predict

    def guided(tokens: Int64[Tensor, "n h w"], labels: Int64[Tensor, " n"]) -> Float[Tensor, "n h w codes"]:
        twins = torch.cat([labels, torch.full_like(labels, null_label)])
        logits = predict(torch.cat([tokens, tokens]), twins)
        conditional, null = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2)
        return null + scale * (conditional - null)

    return guided


@torch.no_grad()
def confidence(
    predict: PredictTokens,
    noise: TokenNoise,
    labels: Int64[Tensor, " n"],
    specification: LatentSpecification,
    decoding: TokenDecoding,
    *,
    choice_temperature: float | int = 4.5,
    callback: TokenCallback | None = None,
) -> Int64[Tensor, "n h w"]:
    """Fill the tokens of which the network is surest: the largest log-likelihood plus Gumbel noise that fades out.

    `choice_temperature` is the noise's factor at the first step, from where it falls linearly to 0 at the last: 0 for
    none; 4.5 in MaskGIT and, for 256 px, in Besnier & Chen.
    """

    def surest(state: TokenStep, num_filled: int, num: int) -> Tensor:
        is_filled = (state.tokens != specification.channels).flatten(1)
        fading = choice_temperature * (1.0 - state.progress)
        certainty = state.log_likelihood.flatten(1)
        certainty = certainty + fading * noise.gumbel() if fading > 0 else certainty
        certainty = certainty.masked_fill(is_filled, float("-inf"))
        return certainty.argsort(dim=1, descending=True, stable=True)[:, :num]  # stable: the same on any device

    rule = decoding.step_rule or "increments"
    return _decode(predict, noise, labels, specification, decoding, rule, surest, callback)


def halton_order(height: int, width: int) -> Int64[Tensor, " cells"]:
    """Order the cells by the first point of the Halton sequence (bases 2 and 3, from its point 1 on) that hits them.

    Any first few are spread over the whole grid: tokens filled in the same step should know little of each other.
    Fractions are of integers, so that no cell is missed by rounding. The search ends: a cell contains a box of sides
    2^-a >= 1 / (4 height) and 3^-b >= 1 / (9 width), and such a box is hit once in 2^a 3^b consecutive points.
    """
    num_points = 4 * height * width
    while True:
        points = np.arange(1, num_points + 1, dtype=np.int64)
        cells = _hit(points, _ROW_BASE, height) * width + _hit(points, _COLUMN_BASE, width)
        found, first_points = np.unique(cells, return_index=True)
        if len(found) == height * width:
            return torch.from_numpy(found[first_points.argsort()])
        num_points *= 2


def _hit(points: np.ndarray, base: int, size: int) -> np.ndarray:
    """Say in which of `size` equal parts of [0, 1) the radical inverses of points lie."""
    numerator, denominator, rest = np.zeros_like(points), 1, points
    while rest.any():
        rest, digit = np.divmod(rest, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator * size // denominator


@torch.no_grad()
def halton(
    predict: PredictTokens,
    noise: TokenNoise,
    labels: Int64[Tensor, " n"],
    specification: LatentSpecification,
    decoding: TokenDecoding,
    *,
    callback: TokenCallback | None = None,
) -> Int64[Tensor, "n h w"]:
    """Fill the tokens in the order of the Halton sequence, whatever the network is sure of.

    The authors take 32 steps and a constant scale.
    """
    order = halton_order(specification.height, specification.width).to(noise.device).expand(len(noise), -1)

    def next_in_order(state: TokenStep, num_filled: int, num: int) -> Tensor:
        return order[:, num_filled : num_filled + num]

    rule = decoding.step_rule or "remaining"
    return _decode(predict, noise, labels, specification, decoding, rule, next_in_order, callback)


def _decode(
    predict: PredictTokens,
    noise: TokenNoise,
    labels: Int64[Tensor, " n"],
    specification: LatentSpecification,
    decoding: TokenDecoding,
    rule: StepRule,
    choose: _Choose,
    callback: TokenCallback | None,
) -> Int64[Tensor, "n h w"]:
    grid, mask_token = (specification.height, specification.width), specification.channels
    if noise.grid != grid:
        raise UserError(f"the noise is of {noise.grid} tokens, the generator of {grid}", "Make it of the generator's")
    counts = tokens_per_step(decoding.schedule, grid[0] * grid[1], decoding.num_steps, rule=rule)
    tokens = torch.full((len(noise), *grid), mask_token, device=noise.device)
    labels, is_sound, num_filled = labels.to(noise.device), torch.tensor(True, device=noise.device), 0
    for step, num in enumerate(counts):
        progress = step / (len(counts) - 1) if len(counts) > 1 else 1.0
        guided = classifier_free_token_guidance(predict, decoding.scale_at(progress), specification.num_classes)
        codes, log_likelihood = _draw_codes(guided(tokens, labels).flatten(1, 2), noise.uniform(), decoding)
        is_sound &= log_likelihood.isfinite().all()
        proposal = torch.where(tokens == mask_token, codes.unflatten(1, grid), tokens)
        state = TokenStep(
            step=step,
            progress=progress,
            tokens=tokens,
            proposal=proposal,
            log_likelihood=log_likelihood.unflatten(1, grid),
        )
        if callback:
            callback(state)
        cells = choose(state, num_filled, num)
        # A new tensor: a callback may have kept the old one.
        tokens = tokens.flatten(1).scatter(1, cells, proposal.flatten(1).gather(1, cells)).unflatten(1, grid)
        num_filled += num
    if not bool(is_sound):  # asked once, so that no step waits for the device
        raise UserError("the transformer's logits became NaN or infinite", "Try --precision fp32")
    return tokens


def _draw_codes(
    logits: Float[Tensor, "n tokens codes"], uniform: Float[Tensor, "n tokens"], decoding: TokenDecoding
) -> tuple[Int64[Tensor, "n tokens"], Float[Tensor, "n tokens"]]:
    """Invert the cumulative distribution: one uniform number for each token, not one for each code of each."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / decoding.temperature
    names = None
    if decoding.top_k is not None and decoding.top_k < logits.shape[-1]:
        logits, names = logits.topk(decoding.top_k, dim=-1)
    log_likelihoods = logits.log_softmax(dim=-1)
    cumulative = log_likelihoods.exp().cumsum(-1)
    total = cumulative[..., -1]
    # Below the total, so that the code found is one that adds to the sum: none of probability 0 is drawn.
    wanted = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, wanted[..., None], right=True).clamp(max=logits.shape[-1] - 1)
    codes = drawn if names is None else names.gather(-1, drawn)
    return codes.squeeze(-1), log_likelihoods.gather(-1, drawn).squeeze(-1)
