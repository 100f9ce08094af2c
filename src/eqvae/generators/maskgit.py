"""MaskGIT: hidden tokens are guessed from the others (Chang et al., arXiv:2202.04200).

A schedule gamma says how many tokens are masked (Section 3.1): it falls from gamma(0) = 1, all, to gamma(1) = 0. In
training r is uniform and gamma(r) is the share of tokens to mask; in sampling r is the share of steps done. "arccos" is
that of Besnier & Chen (arXiv:2310.14400), with which EQ-VAE's MaskGIT was trained; "cosine" is MaskGIT's own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from eqvae.generators.protocol import LatentSpecification, Loss, Objective, drop_labels

PredictTokens = Callable[[Tensor, Tensor], Tensor]
"""A backbone of tokens: partly masked tokens (n, h, w) int64 and labels (n,) int64 to logits (n, h, w, codes).

The token `codes`, one after the last code, is the mask; the label `num_classes` means "no class"."""

Schedule = Literal["arccos", "cosine", "linear", "square"]

StepRule = Literal["remaining", "increments"]
"""`remaining`: gamma says how many tokens are masked after a step (MaskGIT). `increments`: gamma, from its end to its
start, says how many tokens a step fills relative to the other steps (the code of Besnier & Chen)."""

LossTokens = Literal["masked", "all"]
"""`masked`: Equation 2 of MaskGIT. `all`: the code of Besnier & Chen, which learns to repeat visible tokens too."""

_ROUNDING = 1e-9
"""Taken off before rounding up, so that 6 tokens do not become 7 by the last bit of a fraction."""


@dataclass(frozen=True, kw_only=True)
class MaskgitConfig:
    """How MaskGIT is trained."""

    owner: ClassVar[str] = "MaskGIT"

    schedule: Schedule = "arccos"
    """MaskGIT: how many tokens are masked."""

    label_smoothing: float = 0.1
    """MaskGIT: share of each target that is spread over all codes."""

    loss_tokens: LossTokens = "masked"
    """MaskGIT: whether the masked tokens count, or all."""


@dataclass(frozen=True, kw_only=True)
class MaskgitObjective(Objective):
    """The cross-entropy of the true tokens, given those that are not masked (Equation 2 of MaskGIT).

    Its latents are tokens, and a specification's channels are the codes of the codebook.
    """

    codebook_size: int
    """Codes; the next index is the mask."""

    num_classes: int
    """Of the tokens; dropped labels become this."""

    schedule: Schedule = "arccos"
    """How many tokens are masked."""

    label_dropout: float = 0.1
    """Probability of training without the label."""

    label_smoothing: float = 0.1
    """Share of each target that is spread evenly over all codes; 0.1 in the code of Besnier & Chen."""

    loss_tokens: LossTokens = "masked"
    """Which tokens count."""

    def out_channels(self, channels: int) -> int:
        """See `Objective`: a logit for each code."""
        return channels

    def draw(self, num: int, specification: LatentSpecification, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw `mask`, `weight`, and `drop` for the labels; see `Objective`.

        An image's weight is its number of masked tokens over that of the mean image, so that the mean over the global
        batch is the mean over its masked tokens, as in Equation 2, however the batch is shared out.
        """
        share_uniform = torch.rand(num, generator=generator)
        cell_uniform = torch.rand(num, specification.height, specification.width, generator=generator)
        mask = masks_from_uniform(self.schedule, share_uniform, cell_uniform)
        counts = mask.flatten(1).sum(1).double()
        weight = (counts / counts.mean()).float()
        return {"mask": mask, "weight": weight, "drop": torch.rand(num, generator=generator)}

    def loss(
        self,
        predict: PredictTokens,  # no time: the mask itself says how much is hidden
        latents: Int64[Tensor, "n h w"],
        labels: Int64[Tensor, " n"],
        draws: Mapping[str, Tensor],
    ) -> Loss:
        """Compute the loss, and on masked tokens `cross_entropy` in nats without smoothing, and `accuracy`.

        On masked tokens all carry the image's weight, so that means over a batch are means over its masked tokens; see
        `Objective`.
        """
        mask, weight = draws["mask"], draws["weight"]
        seen = drop_labels(labels, draws["drop"], probability=self.label_dropout, null_label=self.num_classes)
        logits = predict(torch.where(mask, self.codebook_size, latents), seen)
        # At least float32: of what autocasts gives, 8 bits would be left of a sum over all codes.
        log_likelihoods = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        surprise = -log_likelihoods.gather(-1, latents[..., None]).squeeze(-1)
        spread = -log_likelihoods.mean(-1)
        smoothed = (1 - self.label_smoothing) * surprise + self.label_smoothing * spread
        is_right = (logits.argmax(-1) == latents).to(surprise.dtype)
        total = smoothed.flatten(1).mean(1) if self.loss_tokens == "all" else weight * _mean_over(mask, smoothed)
        return Loss(
            total=total,
            parts={
                "cross_entropy": weight * _mean_over(mask, surprise.detach()),
                "accuracy": weight * _mean_over(mask, is_right),
            },
        )


def _mean_over(mask: Bool[Tensor, "n h w"], values: Float[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


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
