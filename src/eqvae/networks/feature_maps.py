"""Feature maps of frozen networks, differentiable by the picture, for perceptual distances and discriminators."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.artifacts.files import fingerprint
from eqvae.errors import UserError
from eqvae.networks.pretrained import (
    EFFICIENTNET_LITE0,
    STAGES,
    check_timm_name,
    efficientnet_lite0_maps,
    load_timm_model,
    timm_normalization,
)

FEATURES_FLAG = "--discriminator-features"
WEIGHTS_FLAG = "--discriminator-features-weights"

_FINEST, _COARSEST = 4, 16
"""Strides of the stages that a discriminator looks at, px: finer ones know colours, coarser ones no places."""

_NUM_BLOCKS = 4
"""Of a transformer, evenly spread; with 12 blocks after the third, sixth, ninth and last, as StyleGAN-T and VAR do."""

_PROBE_SIZE_PX = (64, 96)


@final
class FeatureMaps(nn.Module):
    """Some stages of a frozen network, which stays in evaluation mode, for images in [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, network: Any, *, mean: Tensor, std: Tensor, multiple_px: int = 1) -> None:
        """Take a network that gives maps; `mean` and `std` are of pixels in 0 ... 255, (3, 1, 1)."""
        super().__init__()
        self.name, self.multiple_px = name, multiple_px
        self.network = network.requires_grad_(False)
        self.channels = tuple(map(int, network.feature_info.channels()))
        self.strides = tuple(map(int, network.feature_info.reduction()))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "FeatureMaps":
        """Stay in evaluation mode: batch statistics are those of the network's own training."""
        del mode
        return super().train(False)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Compute the maps; a transformer's picture is resized to the nearest whole number of its patches."""
        size = [max(round(side / self.multiple_px), 1) * self.multiple_px for side in x.shape[-2:]]
        if list(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        return self.network((127.5 * x + (127.5 - self.mean)) / self.std)

    def fingerprint(self) -> str:
        """Digest the network's weights."""
        return fingerprint(self.network.state_dict().items())


def efficientnet_lite0(stages: Sequence[int] = STAGES) -> FeatureMaps:
    """Load stages of EfficientNet-Lite0, whose weights need no network; it was trained on `(pixel - 127) / 128`."""
    mean, std = (torch.full((3, 1, 1), value) for value in (127.0, 128.0))
    return FeatureMaps(EFFICIENTNET_LITE0, efficientnet_lite0_maps(stages), mean=mean, std=std)


def load_feature_maps(name: str, weights: Path | None = None) -> FeatureMaps:
    """Load what a discriminator looks through: `efficientnet-lite0`, or a model of timm that takes any size."""
    if weights is not None and not weights.is_file():
        raise UserError(f"{WEIGHTS_FLAG} '{weights}' does not exist", "Check the path")
    if name == EFFICIENTNET_LITE0:
        if weights is not None:
            raise UserError(f"{WEIGHTS_FLAG} has no place: {FEATURES_FLAG} {name} brings its own", "Leave it out")
        return efficientnet_lite0((1, 2, 3))
    check_timm_name(name, FEATURES_FLAG, (EFFICIENTNET_LITE0,))
    import timm

    with torch.device("meta"):
        strides = [each["reduction"] for each in getattr(timm.create_model(name), "feature_info", None) or ()]
        is_transformer = len(set(strides)) == 1
        options: dict[str, Any] = {"features_only": True, "out_indices": _choose_stages(strides)}
        options |= {"dynamic_img_size": True} if is_transformer else {}
        try:
            probe: Any = timm.create_model(name, **options)
            maps = probe(torch.empty(1, 3, *(max(strides) * -(-side // max(strides)) for side in _PROBE_SIZE_PX)))
            fits = [each.shape[1] for each in maps] == list(probe.feature_info.channels())
        except Exception:  # each of timm's models has its own way not to
            fits = False
    if not fits:
        raise UserError(
            f"{FEATURES_FLAG} '{name}' gives no maps of pictures of any size, at strides of {_FINEST} to {_COARSEST}",
            f"Use a vision transformer, a convolutional network, or {EFFICIENTNET_LITE0}, which works offline",
        )
    network = load_timm_model(name, weights, flag=FEATURES_FLAG, weights_flag=WEIGHTS_FLAG, **options)
    mean, std = timm_normalization(network)
    return FeatureMaps(name, network, mean=mean, std=std, multiple_px=strides[0] if is_transformer else 1)


def _choose_stages(strides: Sequence[int]) -> tuple[int, ...]:
    """Choose a transformer's blocks, evenly, or the stages of another network whose strides are in between."""
    if len(set(strides)) == 1:
        return tuple(sorted({max(len(strides) * part // _NUM_BLOCKS - 1, 0) for part in range(1, _NUM_BLOCKS + 1)}))
    return tuple(index for index, stride in enumerate(strides) if _FINEST <= stride <= _COARSEST)
