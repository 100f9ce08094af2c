"""Precision and recall by float16 distances, against a plain transcription in NumPy."""

import numpy as np
import torch

from eqvae.metrics.adm_half import adm_half_precision_recall, squared_distances_in_half
from eqvae.metrics.neighbours import precision_recall


def features(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, 16, generator=torch.Generator().manual_seed(seed)) * 4.0


def test_distances_have_float16s_steps() -> None:
    a, b = features(20, 0), features(30, 1)
    found = squared_distances_in_half(a, b)
    exact = torch.cdist(a.double(), b.double()).square()
    assert torch.equal(found, found.half().float())
    assert not torch.equal(found.double(), exact)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=1.0)
    assert torch.isfinite(squared_distances_in_half(a * 1e3, b)).all()  # float16 would be infinite


def test_it_is_ordinary_precision_and_recall_where_nothing_is_rounded() -> None:
    a, b = (torch.randint(0, 3, (40, 6), generator=torch.Generator().manual_seed(seed)).float() for seed in (0, 1))
    assert adm_half_precision_recall(reference=a, samples=b) == precision_recall(reference=a, samples=b)


def test_it_is_what_the_definition_says() -> None:
    a, b = features(50, 2), features(40, 3) * 0.9
    within, between = (squared_distances_in_half(x, y).numpy() for x, y in ((a, a), (b, a)))
    radii = np.partition(within, 3, axis=1)[:, 3]
    found = adm_half_precision_recall(reference=a, samples=b)
    assert found.precision == (between <= radii).any(1).mean()
    assert adm_half_precision_recall(reference=b, samples=a).recall == found.precision
