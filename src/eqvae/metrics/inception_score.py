"""Inception Score of Salimans et al. 2016 (arXiv:1606.03498), over splits as ADM's evaluator takes them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InceptionScore:
    """How sure a classifier is of each image, and how many classes it sees in all of them."""

    value: float
    """Mean over splits, 1 ... the number of classes."""

    std: float
    """Standard deviation over splits, divided by their number; 0 for a single one."""

    num_splits: int

    split_size: int
    """Images in a split; the last may have fewer, and counts as much as the others."""


def inception_score(logits: Float[Tensor, "n c"], *, split_size: int = 5000) -> InceptionScore:
    """Compute `exp(E_x KL(p(y|x) || p(y)))` for each split of images in their order, and the mean over splits.

    ADM (openai/guided-diffusion, evaluations/evaluator.py) feeds the softmax of logits without the last layer's bias,
    over all 1008 outputs; torch-fidelity calls these `logits_unbiased`.

    Args:
        logits: Of the classifier, one row for each generated image; any number of classes.
        split_size: 5000 by ADM's protocol. The score grows with it until every class is seen often.

    Returns:
        The score. Few images score low whatever they show: at most their number.

    Raises:
        ValueError: If there are no images, or logits that are not finite.
    """
    if len(logits) == 0 or split_size < 1:
        raise ValueError(f"an Inception Score needs an image in each split: {len(logits)} images by {split_size}")
    if not all(math.isfinite(float(extreme)) for extreme in logits.aminmax()):
        raise ValueError("logits must be finite; there are NaN or infinite numbers among them")
    if logits.device.type == "mps":  # it has no float64
        logits = logits.cpu()
    scores = torch.stack([_score(split) for split in logits.split(split_size)])
    return InceptionScore(
        value=float(scores.mean()),
        std=float(scores.std(correction=0)),
        num_splits=len(scores),
        split_size=min(split_size, len(logits)),
    )


def _score(logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """Compute the score of one split by the difference of entropies, which classes of probability 0 do not upset."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    marginal = p.mean(0)
    return ((p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()).exp()
