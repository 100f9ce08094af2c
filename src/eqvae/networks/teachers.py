"""Frozen vision models whose patch tokens REPA aligns a generator with (arXiv:2410.06940).

They stand here, beside the other pretrained features, because generators see no images: the training loop hands the
tokens over, computed for each batch or read from a cache (`eqvae.generators.repa`).
"""

import difflib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, final

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from eqvae.errors import UserError, nearest_name
from eqvae.networks.features import EFFICIENTNET_LITE0, efficientnet_lite0_weights

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"
"""REPA's teacher."""

_EFFICIENTNET_STAGE = 3


class Teacher(nn.Module, ABC):
    """Images to patch tokens; frozen, in evaluation mode.

    Images are resized to as many pixels as give the wanted grid of tokens: 224 px for DINOv2's patches of 14 px and
    a grid of 16, as in REPA's code; bicubically, and unlike there low-passed where they shrink.

    Attributes:
        name: As `load_teacher` knows it.
        channels: Of a token.
        grid: Rows and columns of tokens.
        image_size: What images are resized to, height and width, px.
        network: timm's model.
    """

    name: str
    channels: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    network: Any

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n tokens channels"]:
        """Compute tokens."""
        x = images.contiguous().float()
        if x.shape[-2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bicubic", antialias=True).clamp(0.0, 255.0)
        tokens = self._tokens(x)
        if tokens.shape[1:] != (self.grid[0] * self.grid[1], self.channels):
            raise RuntimeError(f"'{self.name}' gives tokens of {tuple(tokens.shape[1:])}, which is not its grid")
        return tokens.float()

    @abstractmethod
    def _tokens(self, x: Tensor) -> Tensor:
        """Compute tokens of resized images in 0 ... 255."""


def load_teacher(name: str = DINOV2_B, *, grid: tuple[int, int], weights: Path | None = None) -> Teacher:
    """Load a teacher, on the CPU."""
    if weights is not None and not weights.is_file():
        raise UserError(f"--teacher-weights '{weights}' does not exist", "Check the path")
    if name == EFFICIENTNET_LITE0:
        if weights is not None:
            raise UserError(f"--teacher-weights has no place: --teacher {name} brings its own", "Leave it out")
        return EfficientNetLite0Teacher(grid)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [EFFICIENTNET_LITE0, *timm.list_models()], n=1)
        mend = nearest_name(name, near) if near else f"Known: {EFFICIENTNET_LITE0}, and timm's models"
        raise UserError(f"--teacher '{name}' is not known", mend)
    return TimmTeacher(name, grid, weights)


@final
class EfficientNetLite0Teacher(Teacher):
    """EfficientNet-Lite0's maps at stride 16, with ImageNet weights that need no network."""

    def __init__(self, grid: tuple[int, int]) -> None:
        """Load the weights from the installed package."""
        super().__init__()
        self.network = timm.create_model("efficientnet_lite0", features_only=True, out_indices=(_EFFICIENTNET_STAGE,))
        missing = self.network.load_state_dict(efficientnet_lite0_weights(), strict=False).missing_keys
        assert not missing, missing  # later stages' entries are the only ones left over
        self.requires_grad_(False).eval()
        (self.channels,), (stride,) = self.network.feature_info.channels(), self.network.feature_info.reduction()
        self.name, self.grid, self.image_size = EFFICIENTNET_LITE0, grid, (stride * grid[0], stride * grid[1])

    def _tokens(self, x: Tensor) -> Tensor:
        (maps,) = self.network(((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last))
        return maps.flatten(2).transpose(1, 2)


@final
class TimmTeacher(Teacher):
    """A vision model of timm: a transformer's patch tokens after the last norm, or the last map of another network."""

    def __init__(self, name: str, grid: tuple[int, int], weights: Path | None = None) -> None:
        """Load the model."""
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
        overlay = None if weights is None else {"file": str(weights)}
        try:
            self.network = timm.create_model(
                name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **sized
            )
        except Exception as error:  # timm, the hub and torch.load each raise their own
            what = " ".join(str(error).split())[:200] or type(error).__name__
            if weights is not None:
                raise UserError(f"'{weights}' holds no weights of timm's '{name}' ({what})", "Check both") from None
            raise UserError(
                f"timm's '{name}' has no weights in the local cache, and the network does not give them ({what})",
                f"Name a file with --teacher-weights, or use --teacher {EFFICIENTNET_LITE0}, which works offline",
            ) from None
        self.requires_grad_(False).eval()
        self.name, self.grid, self.channels = name, grid, int(self.network.num_features)
        config = timm.data.resolve_model_data_config(self.network)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", 255.0 * torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)

    def _tokens(self, x: Tensor) -> Tensor:
        features = self.network.forward_features((x - self.mean) / self.std)
        if self._num_prefix_tokens is not None:
            return features[:, self._num_prefix_tokens :]
        if features.shape[-1] == self.channels and features.shape[1] != self.channels:  # Swin keeps channels last
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)
