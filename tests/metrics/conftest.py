"""What the tests of features and scores share: weights of untrained networks, as files."""

import io
import math
from pathlib import Path

import pytest
import timm
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Blank(FeatureExtractorInceptionV3):
    """Takes no weights."""

    def load_state_dict(self, *_: object, **__: object) -> None:
        """Leave everything as it is."""


@pytest.fixture(scope="session")
def untrained_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.pth` of random weights whose signal neither dies nor explodes."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    state = _Blank("blank", ["2048"], feature_extractor_weights_path=nothing).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, weight in state.items():
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            state[name] = torch.randn(weight.shape, generator=generator) * math.sqrt(2 / fan_in)
        elif name == "fc.bias":
            state[name] = torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "untrained.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of timm's small `test_resnet`, untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet")
    path = tmp_path_factory.mktemp("timm") / "resnet.pth"
    torch.save(network.state_dict(), path)
    return path
