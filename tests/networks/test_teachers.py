"""REPA's teachers: tokens in the right order, from the right weights."""

import pytest
import timm
import torch

from eqvae.errors import UserError
from eqvae.networks.pretrained import efficientnet_lite0_maps
from eqvae.networks.teachers import DINOV2_B, load_teacher

VIT = "vit_tiny_patch16_224"


def _images(num: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(VIT)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(model.state_dict(), path)
    return path


def test_efficientnets_tokens_are_its_map_row_by_row():
    teacher = load_teacher("efficientnet-lite0", grid=(4, 6))
    assert (teacher.channels, teacher.image_size) == (112, (64, 96))
    images = _images(2, 64, 96)
    tokens = teacher(images)
    assert tokens.shape == (2, 24, 112)
    with torch.no_grad():
        maps = efficientnet_lite0_maps()((images.float() - 127) / 128)[3]
    assert torch.allclose(tokens.reshape(2, 4, 6, 112), maps.permute(0, 2, 3, 1), atol=1e-3)


def test_small_images_are_enlarged_to_the_grid():
    teacher = load_teacher("efficientnet-lite0", grid=(3, 3))
    assert teacher(_images(2, 16, 16)).shape == (2, 9, 112)


def test_a_vits_tokens_are_its_patches_without_the_class(vit_weights):
    teacher = load_teacher(VIT, grid=(14, 14), weights=vit_weights)
    assert (teacher.channels, teacher.image_size) == (192, (224, 224))
    model = timm.create_model(VIT).eval()
    model.load_state_dict(torch.load(vit_weights, weights_only=True))
    images = _images(1, 224, 224)
    with torch.no_grad():
        expected = model.forward_features((images / 255 - 0.5) / 0.5)[:, 1:]
    assert torch.allclose(teacher(images), expected, atol=1e-4)


def test_a_vits_positions_are_resized_to_the_grid(vit_weights):
    teacher = load_teacher(VIT, grid=(2, 4), weights=vit_weights)
    assert teacher.image_size == (32, 64)
    assert teacher(_images(2, 64, 128)).shape == (2, 8, 192)


def test_teachers_are_frozen_and_never_train(vit_weights):
    for teacher in (
        load_teacher("efficientnet-lite0", grid=(2, 2)),
        load_teacher(VIT, grid=(2, 2), weights=vit_weights),
    ):
        assert not teacher.train().training
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not teacher(_images(1, 32, 32)).requires_grad


def test_teachers_that_cannot_be_had_are_named(tmp_path, vit_weights, monkeypatch):
    with pytest.raises(
        UserError, match="--teacher 'vit_tyni_patch16_224' is not known. Did you mean 'vit_tiny_patch16_224'"
    ):
        load_teacher("vit_tyni_patch16_224", grid=(2, 2))
    with pytest.raises(UserError, match="missing.pth' does not exist"):
        load_teacher(VIT, grid=(2, 2), weights=tmp_path / "missing.pth")
    with pytest.raises(UserError, match="has no place"):
        load_teacher("efficientnet-lite0", grid=(2, 2), weights=vit_weights)
    with pytest.raises(UserError, match="holds no weights of timm's 'vit_small_patch16_224'"):
        load_teacher("vit_small_patch16_224", grid=(2, 2), weights=vit_weights)

    def no_network(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(UserError, match="no weights in the local cache.*efficientnet-lite0, which works offline"):
        load_teacher(DINOV2_B, grid=(2, 2))
