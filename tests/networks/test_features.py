"""Features: real weights in the right places, torch-fidelity's Inception number for number, names of figures."""

from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torch.nn.functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eqvae.errors import UserError
from eqvae.images import adm_crop, open_images, to_images
from eqvae.images import data as sources
from eqvae.losses.reconstruction import FeatureDistance
from eqvae.networks.features import load_features, metric_key
from eqvae.networks.pretrained import (
    INCEPTION_WEIGHTS_FILE,
    ConvolutionReLU6,
    efficientnet_lite0_maps,
    efficientnet_lite0_weights,
    fuse_for_inference,
    inception_is_cached,
    read_inception_weights,
)
from eqvae.runtime.device import autocast


@pytest.fixture
def images():
    """Three photographs, 8 bits, 48 px."""
    source = open_images("photos")
    crops = [torch.from_numpy(adm_crop(source.read(index), 48)) for index in range(3)]
    return torch.stack(crops).permute(0, 3, 1, 2)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Empty caches, and nobody to ask."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


# EfficientNet-Lite0 -------------------------------------------------------------------------------------------------


def test_the_whole_network_recognizes_photographs():
    """The classifier names two of the photographs right: the 296 entries lie where they belong."""
    network = timm.create_model("efficientnet_lite0").eval()
    network.load_state_dict(efficientnet_lite0_weights())
    source = open_images(str(Path(sources.__file__).with_name("photographs")))
    names = [source.label(index) for index in range(len(source))]
    x = to_images([adm_crop(source.read(index), 224) for index in range(len(source))])
    with torch.inference_mode():
        best = network((127.5 * x + 0.5) / 128).softmax(1).topk(5).indices.tolist()
    cat = best[next(index for index, name in enumerate(names) if "chelsea" in name)]
    assert set(cat) & {281, 282, 283, 284, 285}  # tabby, tiger cat, Persian, Siamese, Egyptian cat
    rocket = best[next(index for index, name in enumerate(names) if "rocket" in name)]
    assert set(rocket) & {657, 744, 812, 682}  # missile, projectile, space shuttle, obelisk


def test_feature_maps_are_those_of_the_network():
    features = efficientnet_lite0_maps()
    maps = features(torch.zeros(1, 3, 64, 64))
    assert [tuple(each.shape[1:]) for each in maps] == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (112, 4, 4),
        (320, 2, 2),
    ]
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not FeatureDistance().train().network.training


def test_efficientnet_lite0_is_timm_s_network(images):
    network = timm.create_model("efficientnet_lite0").eval()
    network.load_state_dict(efficientnet_lite0_weights())
    with torch.inference_mode():
        x = F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True)
        maps = network.forward_features((x - 127) / 128)
        expected = network.global_pool(maps), network((x - 127) / 128)
    features = load_features("efficientnet-lite0").extract(images)
    torch.testing.assert_close(features.pooled, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.logits, expected[1], rtol=1e-4, atol=1e-4)
    assert features.pooled.shape == (3, 1280)
    assert features.spatial is None


def test_every_normalization_is_fused():
    network = timm.create_model("efficientnet_lite0").eval()
    fused = fuse_for_inference(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())  # a copy was fused


@pytest.mark.parametrize("has_relu6", [True, False])
def test_a_fused_convolution_is_the_same_with_and_without_its_kernel(monkeypatch, has_relu6):
    layer = ConvolutionReLU6(torch.nn.Conv2d(4, 8, 3, stride=2, padding=1), has_relu6=has_relu6)
    x = 20 * torch.randn(2, 4, 9, 9)
    with torch.inference_mode():
        y = layer(x)
        with autocast(torch.device("cpu"), "bf16"):
            assert layer(x).dtype == torch.bfloat16
        monkeypatch.setattr("eqvae.networks.pretrained._has_fused_kernel", lambda: False)
        torch.testing.assert_close(y, layer(x))
    assert float(y.max()) == 6.0 if has_relu6 else float(y.max()) > 6.0


# Inception ----------------------------------------------------------------------------------------------------------


def test_inception_is_torch_fidelity_s(untrained_inception, images):
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased", "logits"], feature_extractor_weights_path=str(untrained_inception)
    )
    with torch.inference_mode():
        pooled, logits, biased = theirs(images)
    features = load_features("inception", weights=untrained_inception).extract(images)
    assert float(pooled.std()) > 0.01  # the random network lets something through
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.logits, logits, rtol=1e-5, atol=1e-4)
    assert float((features.logits - biased).abs().max()) > 0.1  # ADM's evaluator adds no bias


def test_spatial_features_are_the_first_channels_of_mixed_6(untrained_inception, images):
    """A plainly written forward pass up to TensorFlow's mixed_6, which is Mixed_6d, and its 1 x 1 branch."""
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(untrained_inception))
    seen = {}
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], output=output))
    with torch.inference_mode():
        theirs(images)
        branch = theirs.Mixed_6d.branch1x1
        y = F.conv2d(seen["x"], branch.conv.weight)
        y = (y - branch.bn.running_mean.view(-1, 1, 1)) / (branch.bn.running_var.view(-1, 1, 1) + 1e-3).sqrt()
        y = torch.relu(y * branch.bn.weight.view(-1, 1, 1) + branch.bn.bias.view(-1, 1, 1))
    torch.testing.assert_close(y, seen["output"][:, :192], rtol=1e-4, atol=1e-5)
    spatial = load_features("inception", weights=untrained_inception).extract(images).spatial
    assert spatial is not None
    assert spatial.shape == (3, 17 * 17 * 7)
    expected = y.permute(0, 2, 3, 1)[..., :7].reshape(3, -1)  # as ADM cuts NHWC
    torch.testing.assert_close(spatial, expected, rtol=1e-4, atol=1e-5)
    assert float(spatial.std()) > 0.01


def test_inception_s_weights_from_the_cache_and_as_safetensors(untrained_inception, no_network, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(untrained_inception, weights_only=True)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / INCEPTION_WEIGHTS_FILE
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    save_file(state, tmp_path / "inception.safetensors")
    for path in (untrained_inception, None, tmp_path / "inception.safetensors"):
        weights = read_inception_weights(path)
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], state[name]) for name in state)
    assert inception_is_cached()


def test_inception_without_weights_says_where_they_go(no_network, tmp_path):
    with pytest.raises(UserError) as caught:
        load_features("inception")
    assert not inception_is_cached()
    line = str(caught.value)
    assert "\n" not in line
    assert INCEPTION_WEIGHTS_FILE in line
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in line
    assert "--features efficientnet-lite0" in line
    assert not list((tmp_path / "torch" / "hub" / "checkpoints").iterdir())


def test_inception_s_weights_that_are_none(untrained_inception, tmp_path):
    with pytest.raises(UserError, match=r"none.pth' does not exist"):
        load_features("inception", weights=tmp_path / "none.pth")
    path = tmp_path / "truncated.pth"
    path.write_bytes(untrained_inception.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"truncated.pth' is truncated"):
        load_features("inception", weights=path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not those of torch-fidelity's Inception-v3"):
        load_features("inception", weights=path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no named weights but list"):
        load_features("inception", weights=path)


class Malicious:
    """Makes a file when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_inception_s_weights_that_hold_code(tmp_path):
    torch.save({"fc.weight": Malicious(tmp_path / "marker")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="code"):
        load_features("inception", weights=tmp_path / "weights.pth")
    assert not (tmp_path / "marker").exists()


# timm ---------------------------------------------------------------------------------------------------------------


def test_a_timm_model_with_its_own_normalization(timm_weights, images):
    network = timm.create_model("test_resnet", num_classes=0).eval()
    network.load_state_dict(torch.load(timm_weights, weights_only=True), strict=False)
    config = timm.data.resolve_model_data_config(network)
    x = F.interpolate(images.float(), config["input_size"][1:], mode=config["interpolation"], antialias=True)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        expected = network((x.clamp(0, 255) / 255 - mean) / std)
    features = load_features("test_resnet", weights=timm_weights).extract(images)
    torch.testing.assert_close(features.pooled, expected, rtol=1e-4, atol=1e-5)
    assert features.logits is None


def test_a_timm_model_without_network_and_weights_that_are_not_its_own(no_network, timm_weights, tmp_path):
    with pytest.raises(UserError, match="--features efficientnet-lite0, which works offline") as caught:
        load_features("test_resnet")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"resnet.pth' holds no weights of timm's 'test_vit'"):
        load_features("test_vit", weights=timm_weights)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("incepton", "Did you mean 'inception'?"),
        ("efficientnet-lite", "Did you mean 'efficientnet"),
        ("resnet5", "Did you mean 'resnet50'?"),
        ("xyzzyxyzzy", "Known: inception, efficientnet-lite0, and timm's models"),
        ("resnet50.a1_in2k", "Did you mean 'resnet50.a1_in1k'?"),
    ],
)
def test_an_unknown_name(name, says):
    with pytest.raises(UserError) as caught:
        load_features(name)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


# All ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_features_do_not_depend_on_the_batch(images, batch_size):
    extractor = load_features("efficientnet-lite0")
    whole = extractor.extract(images).pooled
    parts = torch.cat([extractor.extract(part).pooled for part in images.split(batch_size)])
    assert float((whole - parts).abs().max()) <= 1e-6 * float(whole.abs().max())


def test_weights_have_no_place_beside_the_package_s(tmp_path):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(UserError, match="brings its own"):
        load_features("efficientnet-lite0", weights=tmp_path / "weights.pth")


def test_figures_are_named_after_their_features():
    assert [metric_key("inception", measure) for measure in ("fid", "kid", "precision")] == ["fid", "kid", "precision"]
    assert metric_key("efficientnet-lite0") == "fd_efficientnet_lite0"
    assert metric_key("efficientnet-lite0", "kid") == "kd_efficientnet_lite0"
    assert metric_key("vit_small_patch14_dinov2.lvd142m", "recall") == "recall_vit_small_patch14_dinov2_lvd142m"
