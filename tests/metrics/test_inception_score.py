"""Inception Score: closed forms, torch-fidelity, a transcript of ADM's formula."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from eqvae.metrics.comparison import inception_score


def logits_of(num_images, num_classes=1008, seed=0):
    return 3.0 * torch.randn(num_images, num_classes, generator=torch.Generator().manual_seed(seed))


def test_images_that_all_look_alike_score_one():
    assert inception_score(torch.ones(50, 1008)).value == pytest.approx(1.0, rel=1e-12)
    assert inception_score(logits_of(1).expand(50, -1)).value == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("certainty", [1e3, 1e30])
def test_one_certain_image_of_each_class_scores_the_number_of_classes(certainty):
    """Probabilities of the other classes are 0 in float64, which the formula as written turns into NaN."""
    logits = certainty * torch.eye(20, 50)
    assert inception_score(logits).value == pytest.approx(20.0, rel=1e-12)


@pytest.mark.parametrize(("num_images", "split_size"), [(40, 40), (40, 10), (40, 8)])
def test_parity_with_torch_fidelity(num_images, split_size):
    logits = logits_of(num_images)
    expected = isc_features_to_metric(logits, splits=num_images // split_size, shuffle=False)
    found = inception_score(logits, split_size=split_size)
    assert found.value == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-8)
    assert (found.num_splits, found.split_size) == (num_images // split_size, split_size)


def test_the_last_split_of_adm_may_be_short():
    logits = logits_of(25)
    probabilities = logits.double().softmax(1).numpy()
    scores = []
    for split in (probabilities[:10], probabilities[10:20], probabilities[20:]):
        divergence = (split * (np.log(split) - np.log(split.mean(0, keepdims=True)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    found = inception_score(logits, split_size=10)
    assert found.value == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.std == pytest.approx(np.std(scores), rel=1e-10)
    assert found.num_splits == 3


def test_fewer_images_than_a_split():
    found = inception_score(logits_of(7))
    assert (found.num_splits, found.split_size, found.std) == (1, 7, 0.0)
    assert 1.0 < found.value <= 7.0


def test_float16_logits_are_computed_in_float64():
    logits = logits_of(30).half()
    assert inception_score(logits).value == inception_score(logits.double()).value


def test_faults_are_named():
    with pytest.raises(ValueError, match="0 images by 5000"):
        inception_score(logits_of(0))
    with pytest.raises(ValueError, match="must be finite"):
        inception_score(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="must be finite"):
        inception_score(torch.tensor([[0.0, -float("inf")]]))
