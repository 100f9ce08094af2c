"""EfficientNet-Lite0: real weights, in the right places."""

import timm
import torch

from eqvae.images import adm_crop, open_images, to_images
from eqvae.metrics.features import EfficientNetLite0, efficientnet_lite0_weights


def test_the_whole_network_recognizes_photographs():
    """The classifier names the three held-out photographs right: the 296 entries lie where they belong."""
    network = timm.create_model("efficientnet_lite0").eval()
    network.load_state_dict(efficientnet_lite0_weights())
    source = open_images("photos", split="evaluation")
    names = [source.label(index) for index in range(len(source))]
    x = to_images([adm_crop(source.read(index), 224) for index in range(len(source))])
    with torch.inference_mode():
        best = network((127.5 * x + 0.5) / 128).softmax(1).topk(5).indices.tolist()
    cat = best[next(index for index, name in enumerate(names) if "chelsea" in name)]
    assert set(cat) & {281, 282, 283, 284, 285}  # tabby, tiger cat, Persian, Siamese, Egyptian cat
    rocket = best[next(index for index, name in enumerate(names) if "rocket" in name)]
    assert set(rocket) & {657, 744, 812, 682}  # missile, projectile, space shuttle, obelisk


def test_feature_maps_are_those_of_the_network():
    features = EfficientNetLite0()
    maps = features(torch.zeros(1, 3, 64, 64))
    assert [tuple(each.shape[1:]) for each in maps] == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (112, 4, 4),
        (320, 2, 2),
    ]
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not features.train().training
