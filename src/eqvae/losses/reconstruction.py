"""L_rec of Equation 1: L1 plus a perceptual distance, summed over pixels as in LDM."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.artifacts.channels import mean_over_triples
from eqvae.networks.feature_maps import efficientnet_lite0
from eqvae.networks.pretrained import Lpips

Perceptual = Literal["lpips", "efficientnet-lite0", "none"]


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How a reconstruction is compared with its target."""

    perceptual: Perceptual = "efficientnet-lite0"
    """`lpips` is the paper's and needs VGG16's weights; `efficientnet-lite0` works offline; or `none`."""

    perceptual_weight: float = 1.0
    """Weight of the perceptual distance beside L1."""

    resolution_weighting: Literal["area", "equal"] = "area"
    """How much a picture scaled by s weighs: its pixels' number s^2, as LDM's sums do, or as much as a whole one."""


class FeatureDistance(nn.Module):
    """The perceptual distance of LPIPS without its learned heads, over EfficientNet-Lite0's feature maps.

    At each stage features are normalized to unit length over channels; their squared difference is averaged over
    positions and then over stages (Equation 1 of arXiv:1801.03924 with equal weights). Works offline. Channels other
    than three are seen in triples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = efficientnet_lite0()

    def forward(self, x: Float[Tensor, "n k h w"], y: Float[Tensor, "n k h w"]) -> Float[Tensor, " n"]:
        return mean_over_triples(self._distance, x, y)

    def _distance(self, x: Float[Tensor, "n 3 h w"], y: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        with torch.no_grad():
            targets = self.network(x)
        distances = [
            (_unit(a) - _unit(b)).square().sum(1).flatten(1).mean(1)
            for a, b in zip(targets, self.network(y), strict=True)
        ]
        return torch.stack(distances).mean(0)


def l1_distance(target: Float[Tensor, "n k h w"], decoded: Float[Tensor, "n k h w"]) -> Float[Tensor, " n"]:
    """Absolute differences of two images, summed over their values: more than 16 bits hold."""
    wide = torch.promote_types(decoded.dtype, torch.float32)
    return (target.to(wide) - decoded.to(wide)).abs().flatten(1).sum(1)


def _unit(feature: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    feature = feature.float()
    return feature / (feature.square().sum(1, keepdim=True) + 1e-8).sqrt()


class ReconstructionLoss(nn.Module):
    """L_rec: `sum over pixels of (|x - y| + weight * perceptual(x, y))`, for each image."""

    def __init__(self, perceptual: Perceptual, perceptual_weight: float) -> None:
        super().__init__()
        makers = {"lpips": Lpips, "efficientnet-lite0": FeatureDistance, "none": None}
        maker = makers[perceptual] if perceptual_weight > 0 else None
        self.distance = maker() if maker is not None else None
        self.perceptual_weight = perceptual_weight

    def forward(
        self, target: Float[Tensor, "n k h w"], reconstruction: Float[Tensor, "n k h w"]
    ) -> Float[Tensor, " n"]:
        loss = l1_distance(target, reconstruction)
        if self.distance is None:
            return loss
        # LDM adds the distance of an image to each of its values before it sums.
        return loss + self.perceptual_weight * target[0].numel() * self.distance(target, reconstruction)
