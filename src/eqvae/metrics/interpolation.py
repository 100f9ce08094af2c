"""Latents between latents, for iFID (Xu et al., arXiv:2603.05630): which two are joined, and where between them.

The abstract leaves distance and path open. `paper` takes the plainest reading: the nearest neighbour by Euclidean
distance, halfway on the straight line. `authors` is what their code does unless told otherwise (`evalvae.py`, commit
bac6ede): one of the ten nearest by cosine, drawn with probabilities softmax(-mean squared difference), halfway on the
great circle. The two can't be compared. That code also seeks the neighbours of ImageNet's validation images among its
training images, and samples the posterior; here both are the latents that are measured, posterior means.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from eqvae.metrics.neighbours import nearest_neighbours
from eqvae.runtime.seeds import generator_for

Interpolations = Literal["paper", "authors"]

NUM_CANDIDATES = 10
"""Of the authors' code."""

_PARALLEL = 1e-6


def choose_partners(z: Float[Tensor, "n c h w"], kind: Interpolations, *, seed: int = 0) -> Int[Tensor, " n"]:
    """Choose which latent each latent is joined with; no latent with itself."""
    flat = z.flatten(1)
    if kind == "paper":
        return nearest_neighbours(flat, flat, num_neighbours=1, skip_self=True).indices[:, 0]
    directions = normalize(flat.float(), dim=1)
    count = min(NUM_CANDIDATES, len(z) - 1)
    near = nearest_neighbours(directions, directions, num_neighbours=count, skip_self=True).indices
    chosen = torch.empty(len(z), dtype=torch.int64)
    for index, candidates in enumerate(near.cpu()):
        squared = (flat[candidates].double() - flat[index].double()).square().mean(1)
        place = torch.multinomial(torch.softmax(-squared, 0), 1, generator=generator_for(seed, index))
        chosen[index] = candidates[place[0]]
    return chosen


def midpoints(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], kind: Interpolations
) -> Float[Tensor, "n c h w"]:
    """Go halfway from each latent to its partner: on the straight line, or on the great circle (slerp)."""
    if kind == "paper":
        return torch.lerp(a, b, 0.5)
    cosine = (normalize(a.flatten(1), dim=1) * normalize(b.flatten(1), dim=1)).sum(1).clamp(-1.0, 1.0)
    angle = cosine.acos()[:, None, None, None]
    is_parallel = angle.sin() < _PARALLEL
    sine = torch.where(is_parallel, 1.0, angle.sin())
    return torch.where(is_parallel, torch.lerp(a, b, 0.5), (0.5 * angle).sin() / sine * (a + b))
