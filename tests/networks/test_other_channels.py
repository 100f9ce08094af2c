"""Networks of three channels before pictures of others: grey as colours alike, more in triples."""

import pytest
import torch

from eqvae.losses.discriminators import build_discriminator
from eqvae.losses.reconstruction import FeatureDistance
from eqvae.networks.feature_maps import load_feature_maps
from eqvae.networks.features import load_features
from eqvae.networks.teachers import load_teacher


def test_features_distances_and_teachers() -> None:
    images = torch.randint(0, 256, (2, 5, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    grey, first, second = images[:, :1], images[:, [0, 1, 2]], images[:, [3, 4, 0]]
    features = load_features("efficientnet-lite0")
    assert torch.equal(features.extract(grey).pooled, features.extract(grey.expand(-1, 3, -1, -1)).pooled)
    mean = (features.extract(first).pooled + features.extract(second).pooled) / 2
    assert torch.allclose(features.extract(images).pooled, mean, atol=1e-5)

    x, y = images / 127.5 - 1.0, images.flip(-1) / 127.5 - 1.0
    distance = FeatureDistance()
    mean = (distance(x[:, [0, 1, 2]], y[:, [0, 1, 2]]) + distance(x[:, [3, 4, 0]], y[:, [3, 4, 0]])) / 2
    assert torch.allclose(distance(x, y), mean, atol=1e-6)

    teacher = load_teacher("efficientnet-lite0", grid=(2, 2))
    assert torch.allclose(teacher(images), (teacher(first) + teacher(second)) / 2, atol=1e-4)


@pytest.mark.parametrize("on_features", [False, True])
def test_a_discriminator_sees_all_channels(on_features: bool) -> None:
    x = torch.rand(2, 5, 64, 64, requires_grad=True)
    maps = load_feature_maps("efficientnet-lite0") if on_features else None
    build_discriminator(0, maps, image_channels=5)(x).sum().backward()
    assert x.grad is not None and bool((x.grad.abs().sum((2, 3)) > 0).all())
