"""Our GroupNorm against PyTorch's in float64, in the layout and the types for which it is there."""

import copy

import pytest
import torch
from torch import nn

from eqvae.runtime.group_norm import GroupNorm, speed_up_group_norms


def gradients(layer: nn.GroupNorm, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", [(3, 16, 24, 20), (1, 32, 128, 96), (2, 8, 1, 5)])
def test_it_is_pytorchs(shape: tuple[int, ...], dtype: torch.dtype, within: float):
    torch.manual_seed(0)
    theirs = nn.GroupNorm(8, shape[1])
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = copy.deepcopy(theirs)
    speed_up_group_norms(ours)
    assert type(ours) is GroupNorm
    x, dy = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    expected = gradients(theirs.double(), (x + 0.3).double(), dy.double())
    found = gradients(ours, x + 0.3, dy)
    if shape[-2] > 1:
        assert type(found[0].grad_fn).__name__ == "_NormalizeBackward"
        assert found[1].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= within * other.abs().max()


def test_elsewhere_it_is_pytorchs_own():
    layer = nn.Sequential(nn.GroupNorm(2, 64), nn.GroupNorm(2, 4, affine=False), nn.GroupNorm(2, 4))
    speed_up_group_norms(layer)
    wide = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    narrow = torch.randn(2, 4, 4, 4)
    for found in (layer[0](wide), layer[1](narrow.requires_grad_()), layer[2](narrow)):
        assert type(found.grad_fn).__name__ == "NativeGroupNormBackward0"
    with torch.no_grad():
        assert layer[2](narrow.to(memory_format=torch.channels_last)).grad_fn is None


def test_a_gradient_has_a_gradient():
    torch.manual_seed(0)
    theirs = nn.GroupNorm(8, 16)
    ours = copy.deepcopy(theirs)
    speed_up_group_norms(ours)
    penalties = []
    for layer in (theirs, ours):
        x = torch.linspace(-1, 2, 2 * 16 * 64).view(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).square().sum() + layer(x).pow(3).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), [x, layer.weight]))
    torch.testing.assert_close(penalties[1], penalties[0], rtol=2e-3, atol=1e-3)
