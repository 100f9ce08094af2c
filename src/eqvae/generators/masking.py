"""How many tokens are masked, and which: MaskGIT's schedules (Chang et al., arXiv:2202.04200, Section 3.1).

A schedule gamma falls from gamma(0) = 1, all masked, to gamma(1) = 0. In training r is uniform and gamma(r) is the
share of tokens to mask; in sampling r is the share of steps done. "arccos" is that of Besnier & Chen
(arXiv:2310.14400), with which EQ-VAE's MaskGIT was trained; "cosine" is MaskGIT's own.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Schedule = Literal["arccos", "cosine", "linear", "square"]

StepRule = Literal["remaining", "increments"]
"""`remaining`: gamma says how many tokens are masked after a step (MaskGIT). `increments`: gamma, from its end to its
start, says how many tokens a step fills relative to the other steps (the code of Besnier & Chen)."""

_ROUNDING = 1e-9
"""Taken off before rounding up, so that 6 tokens do not become 7 by the last bit of a fraction."""


def masked_share(schedule: Schedule, r: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Evaluate gamma: arccos(r) / (pi / 2), cos(pi r / 2), 1 - r or 1 - r^2."""
    match schedule:
        case "arccos":
            return r.arccos() * (2 / math.pi)
        case "cosine":
            return (r * (math.pi / 2)).cos().clamp(min=0.0)
        case "linear":
            return 1 - r
        case "square":
            return 1 - r.square()


def num_masked(schedule: Schedule, r: Float[Tensor, " n"], num_tokens: int) -> Int64[Tensor, " n"]:
    """Count the tokens to mask: gamma(r) N, rounded up as in Section 3.1 of MaskGIT, and at least one."""
    wanted = masked_share(schedule, r.double()) * num_tokens
    return (wanted - _ROUNDING).ceil().long().clamp(1, num_tokens)


def masks_from_uniform(
    schedule: Schedule, share_uniform: Float[Tensor, " n"], cell_uniform: Float[Tensor, "n h w"]
) -> Bool[Tensor, "n h w"]:
    """Turn uniform numbers into masks: the cells with the smallest numbers are masked, exactly `num_masked` of them.

    MaskGIT masks an exact number of tokens; the code of Besnier & Chen masks each with probability gamma(r), which has
    the same mean and now and then leaves nothing to predict.
    """
    num_tokens = cell_uniform[0].numel()
    counts = num_masked(schedule, share_uniform, num_tokens)
    order = cell_uniform.flatten(1).argsort(dim=1, stable=True)
    is_among_first = torch.arange(num_tokens, device=order.device) < counts[:, None]
    return torch.zeros_like(is_among_first).scatter(1, order, is_among_first).reshape(cell_uniform.shape)


def tokens_per_step(
    schedule: Schedule, num_tokens: int, num_steps: int, *, rule: StepRule = "remaining"
) -> tuple[int, ...]:
    """Plan a sampler's steps: how many tokens each of them fills."""
    if num_tokens < 1 or num_steps < 1:
        raise ValueError(f"{num_tokens} tokens are to be filled in {num_steps} steps")
    num_steps = min(num_steps, num_tokens)
    if rule == "remaining":
        done = torch.arange(1, num_steps, dtype=torch.float64) / num_steps
        wanted = num_tokens - (masked_share(schedule, done) * num_tokens - _ROUNDING).ceil()
    else:
        parts = masked_share(schedule, torch.linspace(1, 0, num_steps, dtype=torch.float64))
        wanted = (parts / parts.sum() * num_tokens).round().clamp(min=1).cumsum(0)[:-1]
    counts, filled = [], 0
    for step, total in enumerate(wanted.long().tolist()):
        # At least one token in this step, and one left for each step to come.
        until = min(max(total, filled + 1), num_tokens - (num_steps - 1 - step))
        counts.append(until - filled)
        filled = until
    return (*counts, num_tokens - filled)
