"""The contract: latent specifications and label dropout."""

import pytest
import torch

from eqvae.generators.protocol import LatentSpecification, drop_labels


def test_a_specification_knows_its_shape():
    assert LatentSpecification(channels=4, height=2, width=3, num_classes=0).shape == (4, 2, 3)


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"height": 0}, {"width": -1}, {"num_classes": -1}])
def test_impossible_specifications_are_refused(wrong):
    with pytest.raises(ValueError, match="describes no latents"):
        LatentSpecification(**{"channels": 4, "height": 2, "width": 3, "num_classes": 0} | wrong)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_as_often_as_asked(probability):
    labels, uniform = torch.arange(20_000) % 10, torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(labels, uniform, probability=probability, null_label=10)
    is_null = dropped == 10
    assert is_null.float().mean().item() == pytest.approx(probability, abs=0.01)
    assert torch.equal(dropped[~is_null], labels[~is_null])
    by_class = [is_null[labels == label].float().mean().item() for label in range(10)]
    assert max(by_class) - min(by_class) < 0.06
