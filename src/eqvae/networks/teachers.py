"""Frozen vision models whose patch tokens REPA aligns a generator with (arXiv:2410.06940).

They stand here, beside the other pretrained features, because generators see no images: the training loop hands the
tokens over, computed for each batch or read from a cache (`eqvae.generators.repa`).
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from eqvae.artifacts.channels import mean_over_triples
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.networks.pretrained import (
    EFFICIENTNET_LITE0,
    check_timm_name,
    efficientnet_lite0_maps,
    load_timm_model,
    timm_normalization,
)

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"
"""REPA's teacher."""

_EFFICIENTNET_STAGE = 3


class Teacher(nn.Module, ABC):
    """Images, 0 ... 255, to patch tokens; frozen, in evaluation mode. Channels other than three are seen in triples.

    Images are resized to as many pixels as give the wanted grid of tokens: 224 px for DINOv2's patches of 14 px and
    a grid of 16, as in REPA's code; bicubically, and unlike there low-passed where they shrink.
    """

    name: str
    channels: int
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    image_size: tuple[int, int]
    """Height and width that images are resized to, px."""
    network: Any

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Shaped[Tensor, "n k h w"]) -> Float[Tensor, "n tokens channels"]:
        x = images.contiguous().float()
        if x.shape[-2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bicubic", antialias=True).clamp(0.0, 255.0)
        tokens = mean_over_triples(self._tokens, x)
        if tokens.shape[1:] != (self.grid[0] * self.grid[1], self.channels):
            raise RuntimeError(f"'{self.name}' gives tokens of {tuple(tokens.shape[1:])}, which is not its grid")
        return tokens.float()

    @abstractmethod
    def _tokens(self, x: Tensor) -> Tensor:
        """Compute tokens of resized images in 0 ... 255."""


def load_teacher(name: str = DINOV2_B, *, grid: tuple[int, int], weights: Path | None = None) -> Teacher:
    """Load a teacher, on the CPU."""
    check_teacher(name, weights)
    return EfficientNetLite0Teacher(grid) if name == EFFICIENTNET_LITE0 else TimmTeacher(name, grid, weights)


def check_teacher(
    name: str, weights: Path | None, *, flag: str = "--teacher", weights_flag: str = "--teacher-weights"
) -> None:
    """Refuse a teacher that there is not, and weights that are none or have no place."""
    if weights is not None and not weights.is_file():
        raise UserError(f"{weights_flag} '{weights}' does not exist", "Check the path")
    if name != EFFICIENTNET_LITE0:
        check_timm_name(name, flag, (EFFICIENTNET_LITE0,))
    elif weights is not None:
        raise UserError(f"{weights_flag} has no place: {flag} {name} brings its own", "Leave it out")


class Projection(nn.Module):
    """A frozen teacher, and a learned 1 x 1 convolution from latents to its channels."""

    def __init__(self, teacher: Teacher, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.convolution = nn.Conv2d(autoencoder.latent_channels, teacher.channels, 1, bias=False)


@final
class EfficientNetLite0Teacher(Teacher):
    """EfficientNet-Lite0's maps at stride 16, with ImageNet weights that need no network."""

    def __init__(self, grid: tuple[int, int]) -> None:
        """Load the weights from the installed package."""
        super().__init__()
        self.network = efficientnet_lite0_maps((_EFFICIENTNET_STAGE,))
        self.eval()
        (self.channels,), (stride,) = self.network.feature_info.channels(), self.network.feature_info.reduction()
        self.name, self.grid, self.image_size = EFFICIENTNET_LITE0, grid, (stride * grid[0], stride * grid[1])

    def _tokens(self, x: Tensor) -> Tensor:
        (maps,) = self.network(((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last))
        return maps.flatten(2).transpose(1, 2)


@final
class TimmTeacher(Teacher):
    """A vision model of timm: a transformer's patch tokens after the last norm, or the last map of another network."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, grid: tuple[int, int], weights: Path | None = None) -> None:
        import timm

        super().__init__()
        with torch.device("meta"):
            probe: Any = timm.create_model(name, num_classes=0)
        self._num_prefix_tokens: int | None = getattr(probe, "num_prefix_tokens", None)
        if self._num_prefix_tokens is not None:
            stride = probe.patch_embed.patch_size[0]
        else:
            stride = probe.feature_info[-1]["reduction"]
        self.image_size = (stride * grid[0], stride * grid[1])
        # Models with fixed positions are built for this size; timm resizes their positions when it loads weights.
        sized: dict[str, Any] = {"img_size": self.image_size} if hasattr(probe, "patch_embed") else {}
        self.network = load_timm_model(
            name, weights, flag="--teacher", weights_flag="--teacher-weights", num_classes=0, **sized
        )
        self.eval()
        self.name, self.grid, self.channels = name, grid, int(self.network.num_features)
        mean, std = timm_normalization(self.network)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def _tokens(self, x: Tensor) -> Tensor:
        features = self.network.forward_features((x - self.mean) / self.std)
        if self._num_prefix_tokens is not None:
            return features[:, self._num_prefix_tokens :]
        if features.shape[-1] == self.channels and features.shape[1] != self.channels:  # Swin keeps channels last
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)
