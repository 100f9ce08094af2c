"""Discriminators on frozen features, files of all makers, and what regularizes them, against plain NumPy."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from eqvae.artifacts.files import read_json, read_tensors, write_json
from eqvae.errors import UserError
from eqvae.losses.adversarial import AdversarialConfig, LogitAverages, r1_penalty
from eqvae.losses.discriminator_files import begin_discriminator, load_discriminator, save_discriminator
from eqvae.losses.discriminators import FeatureDiscriminator, PatchDiscriminator, build_discriminator
from eqvae.networks.feature_maps import FeatureMaps, efficientnet_lite0, load_feature_maps


@pytest.fixture(scope="module")
def maps() -> FeatureMaps:
    """What a discriminator looks through offline."""
    return load_feature_maps("efficientnet-lite0")


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def patchgan() -> PatchDiscriminator:
    """A small PatchGAN that has seen something."""
    discriminator = PatchDiscriminator(width=8, num_layers=2)
    discriminator(torch.rand(2, 3, 32, 32))
    return discriminator


# R1 and LeCam -------------------------------------------------------------------------------------------------------


def test_r1_of_a_linear_discriminator_is_its_weights_square(x):
    """Patches of 8 px overlap by half: a pixel's gradient is the sum of the weights of all patches that it lies in."""
    layer = nn.Conv2d(3, 1, 8, stride=4).double()
    logits, penalty = r1_penalty(layer, x.double())
    assert torch.equal(logits, layer(x.double()))
    weight, gradient = layer.weight.detach().numpy()[0], np.zeros((3, 64, 96))
    rows, columns = logits.shape[-2:]
    for row in range(rows):
        for column in range(columns):
            gradient[:, 4 * row : 4 * row + 8, 4 * column : 4 * column + 8] += weight
    assert penalty.item() == pytest.approx(0.5 * (gradient**2).sum() / (rows * columns), rel=1e-6)


def test_r1_teaches_the_discriminator_and_not_the_picture(x):
    """D(x) = 1/2 a |x|^2 has the gradient a x: R1 is 1/2 a^2 E|x|^2, and its derivative a E|x|^2."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * self.a * x.square().sum((1, 2, 3)).reshape(-1, 1, 1, 1)

    quadratic, square = Quadratic(), (x.double().numpy() ** 2).sum((1, 2, 3)).mean()
    x.requires_grad_()
    _, penalty = r1_penalty(quadratic, x)
    penalty.backward()
    assert penalty.item() == pytest.approx(0.5 * 0.3**2 * square, rel=1e-5)
    assert quadratic.a.grad.item() == pytest.approx(0.3 * square, rel=1e-5)
    assert x.grad is None


def test_lecam_is_that_of_numpy_step_for_step():
    generator = np.random.default_rng(0)
    averages, real_average, fake_average = LogitAverages(), None, None
    for _ in range(4):
        real, fake = generator.normal(0.5, 1.0, (2, 1, 3, 3)), generator.normal(-0.5, 1.0, (2, 1, 3, 3))
        ours = averages.penalty(torch.from_numpy(real), torch.from_numpy(fake))
        expected = 0.0
        if real_average is not None:
            expected = (np.maximum(real - fake_average, 0) ** 2).mean() + (
                np.maximum(real_average - fake, 0) ** 2
            ).mean()
        assert float(ours) == pytest.approx(expected, rel=1e-6)
        averages.update(real=real.mean(), fake=fake.mean())
        decay = 0.0 if real_average is None else 0.999
        real_average = decay * (real_average or 0.0) + (1 - decay) * real.mean()
        fake_average = decay * (fake_average or 0.0) + (1 - decay) * fake.mean()
    again = LogitAverages()
    again.load(averages.tensors())
    assert again == averages
    assert (averages.real, averages.fake) == pytest.approx((real_average, fake_average), rel=1e-12)


# Frozen features ----------------------------------------------------------------------------------------------------


def test_heads_share_a_grid_and_they_alone_are_learned(maps, x):
    discriminator = FeatureDiscriminator(maps).train()
    before = maps.fingerprint()
    x.requires_grad_()
    logits = discriminator(x)
    assert logits.shape == (2, 3, 4, 6)  # strides 4, 8 and 16, all on the grid of 16
    logits.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert not maps.network.training
    assert all(parameter.grad is None for parameter in maps.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.learned.parameters())
    assert maps.fingerprint() == before
    odd = discriminator(torch.zeros(1, 3, 50, 70))
    assert odd.shape == (1, 3, 4, 5)


def test_a_transformer_is_asked_after_four_blocks_at_any_size(tmp_path: Path, x):
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    found = load_feature_maps("test_vit", weights)
    assert found.strides == (16,) * 4
    discriminator = FeatureDiscriminator(found).train()
    assert discriminator(x).shape == (2, 4, 4, 6)
    assert discriminator(torch.zeros(1, 3, 50, 70)).shape == (1, 4, 3, 4)  # resized to 48 x 64 px
    r1_penalty(discriminator, x)[1].backward()  # twice through attention
    assert all(parameter.grad is not None for parameter in discriminator.learned[0][0].parameters())


def test_the_maps_of_the_perceptual_distance_are_as_trained(x):
    pixels = (127.5 * x + 127.5).double().numpy()
    network = efficientnet_lite0()
    (ours, *_), (expected, *_) = network(x), network.network(torch.from_numpy((pixels - 127) / 128).float())
    assert torch.allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("mixer_s32_224", None, "gives no maps of pictures of any size"),
        ("efficientnet-lite", None, "Did you mean 'efficientnet-lite0'?"),
        ("test_vit", None, "--discriminator-features-weights"),
        ("test_vit", Path("missing.safetensors"), "'missing.safetensors' does not exist"),
        ("efficientnet-lite0", Path(__file__), "brings its own"),
    ],
)
def test_features_that_can_not_be_had_are_refused(name, weights, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as raised:
        load_feature_maps(name, weights)
    assert says in str(raised.value)


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["patchgan", "features"])
def test_what_is_exported_is_loaded(kind, maps, tmp_path: Path, x, capsys):
    discriminator = PatchDiscriminator(width=8, num_layers=2) if kind == "patchgan" else FeatureDiscriminator(maps)
    discriminator.train()(x)  # running statistics are part of it
    save_discriminator(discriminator, tmp_path / "run" / "autoencoder" / "discriminator")
    for place in ("run", "run/autoencoder", "run/autoencoder/discriminator",
                  "run/autoencoder/discriminator/model.safetensors"):  # fmt: skip
        found = load_discriminator(str(tmp_path / place))
        assert found.fingerprint() == discriminator.fingerprint()
    assert torch.equal(found.eval()(x), discriminator.eval()(x))
    names = read_tensors(tmp_path / place)[0]
    assert {name.split(".")[0] for name in names} == {"main" if kind == "patchgan" else "heads"}
    assert found.title in capsys.readouterr().err
    config = read_json(tmp_path / "run/autoencoder/discriminator/config.json")
    assert (config["architecture"], config["fingerprint"]) == (kind, found.fingerprint())


def ldm(state):
    """LDM's or taming-transformers' checkpoint: the losses' networks lie beside the autoencoder."""
    others = {"encoder.conv_in.weight": torch.ones(1), "loss.logvar": torch.ones(1),
              "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)}  # fmt: skip
    return {"state_dict": {f"loss.discriminator.main.{name}": value for name, value in state.items()} | others,
            "global_step": 7}  # fmt: skip


CONTAINERS = {
    "ldm": ldm,
    "pruned-of-containers": lambda state: ldm(state)["state_dict"],
    "llamagen": lambda state: {
        "model": {"encoder.conv_in.weight": torch.ones(1)},
        "discriminator": {f"module.main.{name}": value for name, value in state.items()},
    },
    "alone": lambda state: main(state),
    "our-checkpoint": lambda state: {f"discriminator.{name}": value for name, value in state.items()},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_patchgan_is_found_in_files_of_anybodys_making(container, ending, patchgan, tmp_path: Path, capsys):
    content, path = CONTAINERS[container](patchgan.state_dict()), tmp_path / f"last{ending}"
    if ending == ".ckpt":
        torch.save(content, path)
    elif all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file(content, path)
    else:
        pytest.skip("safetensors holds no containers")
    found = load_discriminator(str(path))
    assert found.fingerprint() == patchgan.fingerprint()
    assert (found.width, found.num_layers, found.min_image_size_px) == (8, 2, 12)
    line = capsys.readouterr().err
    assert "PatchGAN of 2 layers and width 8 (11,241 parameters)" in line
    assert str(path) in line


def main(state, **changes):
    """PatchGAN's weights alone, under their published names, some of them changed or left out (None)."""
    changed = state | {name.replace("_", ".", 1): value for name, value in changes.items()}
    return {f"main.{name}": value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {"encoder.conv_in.weight": torch.ones(1)}, "pruned for use hold none"),
        (lambda state: ldm(state)["state_dict"] | main(state), "2 discriminators: 'loss.discriminator.main', 'main'"),
        (lambda state: main(state, **{"3_running_mean": None}), "missing"),
        (lambda state: main(state, **{"0_weight": torch.ones(8, 6, 4, 4)}), "discriminator of colour pictures"),
        (lambda state: main(state, **{"0_bias": torch.ones(8) * np.nan}), "not finite"),
        (lambda state: {"main.0.weight": torch.tensor(1.0)}, "missing"),
    ],
)
def test_files_without_a_discriminator_that_fits_are_refused(change, says, patchgan, tmp_path: Path):
    torch.save(change(patchgan.state_dict()), tmp_path / "last.ckpt")
    with pytest.raises(UserError) as raised:
        load_discriminator(str(tmp_path / "last.ckpt"))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_wrong_folders_and_other_features_are_refused(maps, tmp_path: Path):
    for place, says in (("missing", "does not exist"), (".", "holds no discriminator")):
        with pytest.raises(UserError, match=says):
            load_discriminator(str(tmp_path / place))
    save_discriminator(build_discriminator(0, maps), tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"features_fingerprint": "another"})
    with pytest.raises(UserError, match="other weights of efficientnet-lite0 than are at hand"):
        load_discriminator(str(tmp_path))
    write_json(tmp_path / "config.json", config | {"architecture": "stylegan"})
    with pytest.raises(UserError, match="names no discriminator"):
        load_discriminator(str(tmp_path))
    write_json(tmp_path / "config.json", {"architecture": "patchgan"})
    with pytest.raises(UserError, match="missing"):
        load_discriminator(str(tmp_path))


# What is asked for --------------------------------------------------------------------------------------------------


def test_a_loaded_discriminator_is_not_warmed_up(patchgan, tmp_path: Path):
    save_discriminator(patchgan, tmp_path)
    fresh = AdversarialConfig().resolved(warmup_steps=50)
    assert (fresh.discriminator_warmup_steps, fresh.discriminator_regularization_weight) == (50, None)
    loaded = AdversarialConfig(discriminator=str(tmp_path))
    assert loaded.resolved(warmup_steps=50).discriminator_warmup_steps == 0
    stated = AdversarialConfig(discriminator=str(tmp_path), discriminator_warmup_steps=9)
    assert stated.resolved(warmup_steps=50).discriminator_warmup_steps == 9
    begun = begin_discriminator(loaded, seed=0)
    assert begun is not None
    assert begun.fingerprint() == patchgan.fingerprint()
    assert begin_discriminator(AdversarialConfig(adversarial_weight=0.0), seed=0) is None
    for kind, weight in (("r1", 0.1), ("lecam", 0.001)):
        config = AdversarialConfig(discriminator_regularization=kind).resolved(warmup_steps=0)
        assert config.discriminator_regularization_weight == weight
        assert config.resolved(warmup_steps=0) == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adversarial_weight": 0.0, "discriminator": "x"}, "--discriminator has no place"),
        ({"adversarial_weight": 0.0, "discriminator_features": "x"}, "--discriminator-features has no place"),
        ({"adversarial_weight": 0.0, "discriminator_regularization": "r1"}, "--discriminator-regularization has no"),
        ({"discriminator": "x", "discriminator_features": "y"}, "says itself what it looks at"),
        ({"discriminator_features_weights": Path("x")}, "Give --discriminator-features too"),
        ({"discriminator_regularization_weight": 1.0}, "Give --discriminator-regularization r1 or lecam too"),
    ],
)
def test_what_contradicts_is_refused(changes, says):
    with pytest.raises(UserError) as raised:
        AdversarialConfig(**changes).resolved(warmup_steps=0)
    assert says in str(raised.value)
