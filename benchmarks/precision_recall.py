"""Precision and recall of two sets of features of 2,048 numbers, against ADM's algorithm.

ADM's (openai/guided-diffusion, evaluations/evaluator.py) is written out below in float32: rows of 10,000 distances to a
whole set at a time, inside or outside as rounding has it. Ours is `eqvae.metrics.neighbours`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Turn, Variant, Work
from eqvae.metrics.neighbours import precision_recall
from eqvae.runtime.device import choose_device
from eqvae.runtime.seeds import generator_for

NUM_FEATURES = 2048
ADM_BATCH_SIZE = 10_000
NUM_NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall(Work):
    """Precision and recall of two sets of features of 2,048 numbers, against ADM's algorithm."""

    unit = "comparison"

    rounds: int = 1
    """Turns of each variant, after one that warms up."""

    num_images: int = 50_000
    """Feature vectors in each of the two sets."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "ADM": Variant(lambda _: self.prepare(adm_precision_recall)),
            "ours": Variant(lambda _: self.prepare(exact_precision_recall)),
        }

    def prepare(self, compare: Callable[[Tensor, Tensor], tuple[float, float]]) -> Turn:
        """Draw the features."""
        device = choose_device(self.device)
        real, fake = (draw_features(self.num_images, of_samples).to(device) for of_samples in (False, True))

        def take_turn() -> dict[str, Any]:
            precision, recall = compare(real, fake)
            return {"units": 1, "precision": precision, "recall": recall}

        return take_turn


def draw_features(num_images: int, of_samples: bool) -> Tensor:
    """Draw vectors like Inception's: not negative, of some 60 directions and noise; samples vary less."""
    directions = torch.randn(60, NUM_FEATURES, generator=generator_for(0)) / 8.0
    features = torch.empty(num_images, NUM_FEATURES)
    for start in range(0, num_images, 1000):
        rows = features[start : start + 1000]
        generator = generator_for(1 + of_samples, start)
        factors = (0.9 if of_samples else 1.0) * torch.randn(len(rows), len(directions), generator=generator)
        noise = 0.1 * torch.randn(rows.shape, generator=generator)
        rows.copy_((0.4 + factors @ directions + noise).relu_())
    return features


def exact_precision_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """Ours."""
    found = precision_recall(reference=reference, samples=samples, num_neighbours=NUM_NEIGHBOURS)
    return found.precision, found.recall


def adm_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances by one product, which may come out below zero."""
    return (a.square().sum(1)[:, None] - 2.0 * a @ b.T + b.square().sum(1)).clamp_(min=0.0)


def adm_precision_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """ADM's precision and recall."""
    radii = []
    for features in (reference, samples):
        parts = []
        for rows in features.split(ADM_BATCH_SIZE):
            distances = rows.new_empty((len(rows), len(features)))
            for start in range(0, len(features), ADM_BATCH_SIZE):
                columns = slice(start, start + ADM_BATCH_SIZE)
                distances[:, columns] = adm_distances(rows, features[columns])
            parts.append(distances.topk(NUM_NEIGHBOURS + 1, dim=1, largest=False).values[:, -1])
        radii.append(torch.cat(parts))
    inside = [torch.zeros(len(each), dtype=torch.bool, device=each.device) for each in (samples, reference)]
    for row in range(0, len(reference), ADM_BATCH_SIZE):
        rows = slice(row, row + ADM_BATCH_SIZE)
        for column in range(0, len(samples), ADM_BATCH_SIZE):
            columns = slice(column, column + ADM_BATCH_SIZE)
            distances = adm_distances(reference[rows], samples[columns])
            inside[0][columns] |= (distances <= radii[0][rows, None]).any(0)
            inside[1][rows] |= (distances <= radii[1][columns]).any(1)
    return float(inside[0].double().mean()), float(inside[1].double().mean())
