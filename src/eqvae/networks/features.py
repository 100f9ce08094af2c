"""Frozen image features: Inception-v3 for FID, EfficientNet-Lite0 where there is no network, any timm model by name."""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from eqvae.artifacts.channels import in_triples
from eqvae.artifacts.files import fingerprint
from eqvae.errors import UserError, nearest_name
from eqvae.networks.pretrained import (
    EFFICIENTNET_LITE0,
    check_timm_name,
    efficientnet_lite0_weights,
    fuse_for_inference,
    inception_is_cached,
    load_timm_model,
    read_inception_weights,
    timm_normalization,
)
from eqvae.runtime.device import Precision, autocast

INCEPTION = "inception"

NUM_SPATIAL_CHANNELS = 7
"""Of Inception's `mixed_6/conv`; with 17 x 17 positions that makes 2023 numbers, about as many as the pooled ones."""

_EFFICIENTNET_LITE0_SIZE_PX = 224
_IMAGES_AT_ONCE_ON_CPU = 8
"""Whose activations stay in a core's cache."""

Measure = Literal["fid", "kid", "kid_std", "precision", "recall"]


def features_at_hand() -> str:
    """Name the features of figures where none are chosen: Inception's where its weights lie in the local cache."""
    return INCEPTION if inception_is_cached() else EFFICIENTNET_LITE0


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

    Channels other than three are seen in triples, whose features are averaged.
    """

    name: str
    weights_fingerprint: str
    min_image_size_px: int = 1

    @torch.inference_mode()
    def extract(self, images: UInt8[Tensor, "n k h w"], precision: Precision = "fp32") -> Features:
        """Compute features; how the images are cut into batches does not show in them, but for rounding."""
        if min(images.shape[-2:]) < self.min_image_size_px:
            raise UserError(
                f"Images of {images.shape[-1]} x {images.shape[-2]} px are too small for --features {self.name}",
                f"It takes {self.min_image_size_px} px and more",
            )
        size = _IMAGES_AT_ONCE_ON_CPU if images.device.type == "cpu" else max(len(images), 1)
        with autocast(images.device, precision):
            parts = [_together(self, part) for part in images.split(size)]
        return _joined(parts, torch.cat)

    @abstractmethod
    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        """Compute the features of a batch that fits into memory."""


def _together(extractor: FeatureExtractor, images: UInt8[Tensor, "n k h w"]) -> Features:
    """Average the features of a picture's triples of channels."""
    views = [extractor(view) for view in in_triples(images)]
    return views[0] if len(views) == 1 else _joined(views, lambda each: torch.stack(each).mean(0))


def _joined(parts: list[Features], join: Callable[[list[Tensor]], Tensor]) -> Features:
    """Join features of several batches, or of several views."""

    def joined(name: str) -> Any:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else join(found)

    return Features(pooled=joined("pooled"), spatial=joined("spatial"), logits=joined("logits"))


def load_features(name: str, *, weights: Path | None = None) -> FeatureExtractor:
    """Load `inception`, `efficientnet-lite0` or any model of timm, on the CPU, in the channels-last layout.

    Weights come from a file, else from the local cache or the network; `efficientnet-lite0` brings its own.
    """
    extractor: FeatureExtractor
    if name == INCEPTION:
        extractor = InceptionFeatures(weights)
    elif weights is not None and not weights.is_file():
        raise UserError(f"--weights '{weights}' does not exist", "Check the path")
    elif name == EFFICIENTNET_LITE0:
        if weights is not None:
            raise UserError(f"--weights '{weights}' has no place: --features {name} brings its own", "Leave it out")
        extractor = EfficientNetLite0Features()
    else:
        check_timm_name(name, "--features", (INCEPTION, EFFICIENTNET_LITE0))
        extractor = TimmFeatures(name, weights)
    return extractor.to(memory_format=torch.channels_last)


@final
class InceptionFeatures(FeatureExtractor):
    """Inception-v3 as FID knows it: TensorFlow's network of 2015-12-05, resized as TensorFlow 1 did it, to 299 px.

    What is read from torch-fidelity's port is what ADM's evaluator reads (openai/guided-diffusion, evaluator.py):

        ADM's graph                             here
        pool_3:0                                the 2048 pooled numbers
        mixed_6/conv:0, channels 0 ... 6        output of `Mixed_6d.branch1x1` after its ReLU; TensorFlow counts the
                                                mixed blocks from 0, so that mixed_6 is torchvision's Mixed_6d
        pool_3 times softmax/logits/MatMul's w  logits without the bias: ADM multiplies by the weight and adds nothing
    """

    def __init__(self, weights: Path | None = None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        state = read_inception_weights(weights)
        # torch-fidelity unpickles whatever file it is given: it gets tensors that were read without, written again.
        file = io.BytesIO()
        torch.save(dict(state), file)
        file.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
            )
        except RuntimeError as error:
            what = " ".join(str(error).split())[:200]
            raise UserError(
                f"The weights are not those of torch-fidelity's Inception-v3 ({what})", "Check --weights"
            ) from None
        self.name, self.weights_fingerprint = INCEPTION, fingerprint(sorted(state.items()))
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the channels of each position together, as ADM's arrays have them."""
        del module, inputs
        self._spatial = output[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        """Compute 2048 pooled and 2023 spatial numbers, and 1008 logits without bias."""
        pooled, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        return Features(pooled=pooled.float(), spatial=spatial.float(), logits=logits.float())


@final
class EfficientNetLite0Features(FeatureExtractor):
    """EfficientNet-Lite0 with ImageNet weights that need no network.

    Images are resized to 224 px, the side that the weights were trained at, bilinearly with antialias and without
    rounding to 8 bits, and normalized by (pixel - 127) / 128.
    """

    def __init__(self) -> None:
        """Load the weights from the installed package."""
        import timm

        super().__init__()
        weights = efficientnet_lite0_weights()
        self.name, self.weights_fingerprint = EFFICIENTNET_LITE0, fingerprint(sorted(weights.items()))
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
        import timm

        super().__init__()
        if weights is None:
            _check_has_weights(name)
        # With its classifier, taken off afterwards: asked for none, timm would let any entry be missing.
        network = load_timm_model(name, weights, flag="--features", weights_flag="--weights")
        network.reset_classifier(0)
        self.network = network
        self.name, self.weights_fingerprint = name, fingerprint(sorted(network.state_dict().items()))
        config = timm.data.resolve_model_data_config(network)
        self._size = tuple(config["input_size"][-2:])
        self._interpolation = "bicubic" if config["interpolation"] == "bicubic" else "bilinear"
        mean, std = timm_normalization(network)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        x = _resize(images, self._size, self._interpolation)
        return Features(pooled=self.network((x - self.mean) / self.std).float().flatten(1))


def _check_has_weights(name: str) -> None:
    """Refuse a tag that timm does not have, and a model without published weights."""
    import timm

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
