"""Frozen image features: Inception-v3 for FID, EfficientNet-Lite0 where there is no network, any timm model by name."""

import difflib
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from eqvae.errors import UserError, nearest_name
from eqvae.networks.efficientnet import EfficientNetLite0, efficientnet_lite0_weights, fuse_for_inference
from eqvae.networks.inception import InceptionV3, find_inception_weights, read_inception_weights

__all__ = [
    "EFFICIENTNET_LITE0",
    "INCEPTION",
    "EfficientNetLite0",
    "FeatureExtractor",
    "Features",
    "Measure",
    "efficientnet_lite0_weights",
    "inception_is_cached",
    "load_features",
    "metric_key",
]

INCEPTION = "inception"
EFFICIENTNET_LITE0 = "efficientnet-lite0"

_EFFICIENTNET_LITE0_SIZE_PX = 224
_IMAGES_AT_ONCE_ON_CPU = 8
"""Whose activations stay in a core's cache."""

Measure = Literal["fid", "kid", "kid_std", "precision", "recall"]


def metric_key(features: str, measure: Measure = "fid") -> str:
    """Name a figure after the features that made it: `fid` and `kid` are Inception's alone."""
    if features == INCEPTION:
        return measure
    prefix = {"fid": "fd", "kid": "kd", "kid_std": "kd_std"}.get(measure, measure)
    return f"{prefix}_{re.sub('[^a-z0-9]+', '_', features.lower())}"


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a batch, float32."""

    pooled: Float[Tensor, "n d"]
    """What Frechet distance, KID, precision and recall compare."""

    spatial: Float[Tensor, "n e"] | None = None
    """What sFID compares; Inception's alone."""

    logits: Float[Tensor, "n k"] | None = None
    """Of ImageNet's classes, where the network has a classifier."""


class FeatureExtractor(nn.Module, ABC):
    """A frozen network that sees 8-bit images, as files hold them, and resizes them its own way.

    Attributes:
        name: What `load_features` was asked for.
        weights_fingerprint: Digest of the weights: 16 hexadecimal digits.
        min_image_size_px: The smallest side that it takes.
    """

    name: str
    weights_fingerprint: str
    min_image_size_px: int = 1

    @torch.inference_mode()
    def extract(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        """Compute features; how the images are cut into batches does not show in them, but for rounding."""
        if min(images.shape[-2:]) < self.min_image_size_px:
            raise UserError(
                f"Images of {images.shape[-1]} x {images.shape[-2]} px are too small for --features {self.name}",
                f"It takes {self.min_image_size_px} px and more",
            )
        size = _IMAGES_AT_ONCE_ON_CPU if images.device.type == "cpu" else max(len(images), 1)
        parts = [self(part) for part in images.split(size)]
        return Features(
            pooled=torch.cat([part.pooled for part in parts]),
            spatial=None if parts[0].spatial is None else torch.cat([part.spatial for part in parts]),
            logits=None if parts[0].logits is None else torch.cat([part.logits for part in parts]),
        )

    @abstractmethod
    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        """Compute the features of a batch that fits into memory."""


def load_features(name: str, *, weights: Path | None = None) -> FeatureExtractor:
    """Load a feature extractor, on the CPU."""
    return _build(name, weights).to(memory_format=torch.channels_last)


def inception_is_cached() -> bool:
    """Whether Inception's weights lie in PyTorch's local cache."""
    return find_inception_weights() is not None


def _build(name: str, weights: Path | None) -> FeatureExtractor:
    if name == INCEPTION:
        return InceptionFeatures(weights)
    if weights is not None and not weights.is_file():
        raise UserError(f"--weights '{weights}' does not exist", "Check the path")
    if name == EFFICIENTNET_LITE0:
        if weights is not None:
            raise UserError(f"--weights '{weights}' has no place: --features {name} brings its own", "Leave it out")
        return EfficientNetLite0Features()
    if not timm.is_model(name):
        known = [INCEPTION, EFFICIENTNET_LITE0, *timm.list_models()]
        near = difflib.get_close_matches(name, known, n=1)
        mend = nearest_name(name, near) if near else f"Known: {INCEPTION}, {EFFICIENTNET_LITE0}, and timm's models"
        raise UserError(f"--features '{name}' is not known", mend)
    return TimmFeatures(name, weights)


@final
class InceptionFeatures(FeatureExtractor):
    """Inception-v3 with TensorFlow's weights, resized to 299 px as TensorFlow 1 did it; see `inception.py`."""

    def __init__(self, weights: Path | None = None) -> None:
        """Load the weights."""
        super().__init__()
        state = read_inception_weights(weights)
        try:
            self.network = InceptionV3(state)
        except RuntimeError as error:
            what = " ".join(str(error).split())[:200]
            raise UserError(
                f"The weights are not those of torch-fidelity's Inception-v3 ({what})", "Check --weights"
            ) from None
        self.name, self.weights_fingerprint = INCEPTION, _digest(state)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        """Compute 2048 pooled and 2023 spatial numbers, and 1008 logits without bias."""
        outputs = self.network(images)
        return Features(pooled=outputs.pooled, spatial=outputs.spatial, logits=outputs.logits)


@final
class EfficientNetLite0Features(FeatureExtractor):
    """EfficientNet-Lite0 with ImageNet weights that need no network.

    Images are resized to 224 px, the side that the weights were trained at, bilinearly with antialias and without
    rounding to 8 bits, and normalized by (pixel - 127) / 128.
    """

    def __init__(self) -> None:
        """Load the weights from the installed package."""
        super().__init__()
        weights = efficientnet_lite0_weights()
        self.name, self.weights_fingerprint = EFFICIENTNET_LITE0, _digest(weights)
        network = timm.create_model("efficientnet_lite0").eval()
        network.load_state_dict(weights)
        self.network: Any = fuse_for_inference(network).requires_grad_(False)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        """Compute 1280 pooled numbers, before the classifier, and 1000 logits."""
        x = _resize(images, (_EFFICIENTNET_LITE0_SIZE_PX, _EFFICIENTNET_LITE0_SIZE_PX), "bilinear")
        x = x.sub_(127.0).div_(128.0).contiguous(memory_format=torch.channels_last)
        pooled = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        return Features(pooled=pooled.float(), logits=self.network.classifier(pooled).float())


@final
class TimmFeatures(FeatureExtractor):
    """Any model of timm: what its classifier would see.

    Images are resized to the size that the model was trained for, with its own interpolation and antialias, and
    normalized its own way. Nothing is cropped: every part of a sample counts.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: Path | None = None) -> None:
        """Load the model."""
        super().__init__()
        if weights is None:
            _check_has_weights(name)
        overlay = None if weights is None else {"file": str(weights)}
        try:
            # With its classifier, taken off afterwards: asked for none, timm would let any entry be missing.
            network: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # timm, the hub and torch.load each raise their own
            what = " ".join(str(error).split())[:200] or type(error).__name__
            if weights is not None:
                raise UserError(f"'{weights}' holds no weights of timm's '{name}' ({what})", "Check both") from None
            raise UserError(
                f"timm's '{name}' has no weights in the local cache, and the network does not give them ({what})",
                f"Name a file with --weights, or use --features {EFFICIENTNET_LITE0}, which works offline",
            ) from None
        network.reset_classifier(0)
        self.network = network.requires_grad_(False).eval()
        self.name, self.weights_fingerprint = name, _digest(network.state_dict())
        config = timm.data.resolve_model_data_config(network)
        self._size = tuple(config["input_size"][-2:])
        self._interpolation = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
        self.register_buffer("mean", 255.0 * torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        """Compute the pooled features."""
        x = _resize(images, self._size, self._interpolation)
        return Features(pooled=self.network((x - self.mean) / self.std).float().flatten(1))


def _check_has_weights(name: str) -> None:
    """Refuse a tag that timm does not have, and a model without published weights."""
    architecture, _, tag = name.partition(".")
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    if not known:
        raise UserError(f"timm has no weights for '{name}'", "Name a file with --weights, or choose another model")
    if tag and name not in known:
        raise UserError(f"timm's '{architecture}' has no weights '{tag}'", nearest_name(name, known))


def _resize(images: UInt8[Tensor, "n 3 _ _"], size: tuple[int, ...], interpolation: str) -> Float[Tensor, "n 3 _ _"]:
    """Resize to (height, width), low-passed where it shrinks; values stay in 0 ... 255."""
    x = F.interpolate(images.contiguous().float(), size, mode=interpolation, antialias=True)
    return x.clamp_(0.0, 255.0) if interpolation == "bicubic" else x  # only bicubic weights can be negative


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Digest named tensors as `Autoencoder.fingerprint` does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
