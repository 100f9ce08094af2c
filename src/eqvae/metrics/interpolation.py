"""Latents between latents, for iFID: a prediction of a generator's FID without a generator (arXiv:2603.05630).

Xu et al., "Making Reconstruction FID Predictive of Diffusion Generation FID": interpolate each latent with its nearest
neighbour, decode, and take the FID between the decoded images and the original ones. It correlates with the FID of
diffusion models trained on the latents at about 0.85 (Pearson and Spearman), where reconstruction FID does not.

This file makes the interpolated latents; the caller decodes them and measures, `ifid` with Inception features and
`ifd_<features>` with others:

    for z in nearest_neighbour_interpolations(latents, batch_size=16):
        moments.add(features(autoencoder.decode(z)))

The paper's abstract leaves distance and path open; `PAPER` takes the plainest reading: the nearest neighbour by
Euclidean distance, halfway on the straight line. `RELEASED_CODE` is what the authors' `evalvae.py` does unless told
otherwise (commit bac6ede of June 2026): neighbours by cosine, one of the ten nearest drawn at random, halfway on the
great circle. Figures of the two are not comparable. That code also seeks neighbours of ImageNet's validation images
among its training images (pass those as `reference`; without it they are sought among the latents themselves), and it
samples the posterior, where posterior means are the habit here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from eqvae.metrics.neighbours import nearest_neighbours
from eqvae.runtime.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class LatentInterpolation:
    """How two latents are chosen and joined."""

    weight: float = 0.5
    """Of the neighbour, in [0, 1]; 0 gives the reconstructions, hence rFID."""

    path: Literal["linear", "spherical"] = "linear"
    """The straight line between flattened latents, neighbours by Euclidean distance; or the great circle of
    `interpolate`, neighbours by the angle between latents."""

    num_candidates: int = 1
    """k: the neighbour is drawn from the k nearest, with probabilities softmax(-mean squared difference)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight is {self.weight}, but the neighbour's share lies in [0, 1]")
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}, but a neighbour is drawn from at least 1")


PAPER = LatentInterpolation()
"""iFID as the abstract of arXiv:2603.05630 defines it."""

RELEASED_CODE = LatentInterpolation(path="spherical", num_candidates=10)
"""iFID as the defaults of its authors' code compute it."""


def choose_neighbours(
    latents: Float[Tensor, "n c h w"],
    *,
    reference: Float[Tensor, "m c2 h2 w2"] | None = None,
    interpolation: LatentInterpolation = PAPER,
    seed: int = 0,
) -> Int[Tensor, " n"]:
    """Choose the neighbour that each latent is interpolated with."""
    others = latents if reference is None else reference
    if others.shape[1:] != latents.shape[1:]:
        raise ValueError(f"the reference's latents are {tuple(others.shape[1:])}, not {tuple(latents.shape[1:])}")
    queries = latents.flatten(1)
    points = queries if reference is None else reference.flatten(1)
    if interpolation.path == "spherical":
        queries = normalize(queries.float(), dim=1)
        points = queries if reference is None else normalize(points.float(), dim=1)
    neighbours = nearest_neighbours(
        queries, points, num_neighbours=interpolation.num_candidates, skip_self=reference is None
    )
    if interpolation.num_candidates == 1:
        return neighbours.indices[:, 0]
    chosen = torch.empty(len(latents), dtype=torch.int64)
    for index, candidates in enumerate(neighbours.indices.cpu()):
        difference = others[candidates.to(others.device)].double() - latents[index].double()
        probabilities = torch.softmax(-difference.flatten(1).square().mean(1), dim=0).cpu()
        chosen[index] = candidates[torch.multinomial(probabilities, 1, generator=generator_for(seed, index))[0]]
    return chosen.to(neighbours.indices.device)


def interpolate(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], interpolation: LatentInterpolation = PAPER
) -> Float[Tensor, "n c h w"]:
    """Join pairs of latents."""
    a, b = (z if z.dtype == torch.float64 else z.float() for z in (a, b))
    t = interpolation.weight
    if interpolation.path == "linear":
        return torch.lerp(a, b, t)
    cosine = (normalize(a.flatten(1), dim=1) * normalize(b.flatten(1), dim=1)).sum(1).clamp(-1.0, 1.0)
    angle = cosine.acos()[:, None, None, None]
    sine = angle.sin()
    parallel = sine < 1e-6
    sine = torch.where(parallel, 1.0, sine)
    circle = (torch.sin((1.0 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return torch.where(parallel, torch.lerp(a, b, t), circle)


def nearest_neighbour_interpolations(
    latents: Float[Tensor, "n c h w"],
    *,
    reference: Float[Tensor, "m c2 h2 w2"] | None = None,
    interpolation: LatentInterpolation = PAPER,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Interpolate each latent with its neighbour, in the order of the latents.

    The neighbours are found before this returns, the interpolations made batch by batch. Latents may lie in a
    memory-mapped file; the search holds one float32 copy of them.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but a batch holds at least 1 latent")
    others = latents if reference is None else reference
    chosen = choose_neighbours(latents, reference=reference, interpolation=interpolation, seed=seed).to(others.device)
    return (
        interpolate(latents[start : start + batch_size], others[chosen[start : start + batch_size]], interpolation)
        for start in range(0, len(latents), batch_size)
    )
