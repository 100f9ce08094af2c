"""Operations of one image in each network, counted on PyTorch's meta device: no weights, no data, no time.

Counted is what `FlopCounterMode` counts: convolutions, matrix products and attention, a multiplication and an addition
as two. Publications of diffusion transformers count the pair as one: DiT-XL/2's "118.6 Gflops" are 237 here.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import nn

from eqvae.autoencoders import build_autoencoder
from eqvae.autoencoders.presets import UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.generators.families import BackboneConfig
from eqvae.generators.transformer import TransformerConfig
from eqvae.losses.reconstruction import Perceptual
from eqvae.networks.features import INCEPTION
from eqvae.networks.pretrained import EFFICIENTNET_LITE0, STAGES
from eqvae.runs.train_run import transformer_flops
from eqvae.runtime.throughput import count_flops
from eqvae.transforms import Compose, Scale, Transform

META = torch.device("meta")
"""Where tensors have shapes and nothing else."""

Architecture = str | Autoencoder
"""A preset's name, or an autoencoder of that architecture, whose weights do not matter."""


@dataclass(frozen=True, kw_only=True)
class CodingFlops:
    """Of an autoencoder, for one image."""

    encode: float
    """To raw latents."""

    tokenize: float
    """From these to tokens; 0 for a continuous autoencoder."""

    decode: float
    """From latents, or from tokens."""


@dataclass(frozen=True, kw_only=True)
class FeatureFlops:
    """Of a network that images are compared by or aligned with."""

    per_image: float

    channels: int
    """Of its features."""


@lru_cache(maxsize=32)
def meta_autoencoder(architecture: Architecture) -> Autoencoder:
    """Build an autoencoder without weights."""
    if isinstance(architecture, Autoencoder):
        return copy.deepcopy(architecture).to(META)
    with META:
        return build_autoencoder(architecture.removeprefix(UNTRAINED), seed=0)


@lru_cache(maxsize=64)
def coding_flops(architecture: Architecture, image_size_px: int) -> CodingFlops:
    """Count encoder and decoder."""
    autoencoder = meta_autoencoder(architecture)
    x = torch.empty(1, 3, image_size_px, image_size_px, device=META)
    with torch.no_grad():
        z = autoencoder.encode(x).mode()
        encode = float(count_flops(autoencoder.encode, x))
        if isinstance(autoencoder, DiscreteAutoencoder):
            tokenize, decode = count_flops(autoencoder.quantize, z), count_flops(autoencoder.decode_quantized, z)
            return CodingFlops(encode=encode, tokenize=float(tokenize), decode=float(decode))
        return CodingFlops(encode=encode, tokenize=0.0, decode=float(count_flops(autoencoder.decode, z)))


@lru_cache(maxsize=16)
def perceptual_flops(name: Perceptual, image_size_px: int) -> float:
    """Count the network behind a perceptual distance; its comparison of features is left out."""
    if name == "none":
        return 0.0
    with META:
        if name == "lpips":
            from torchvision.models import vgg16

            network: Any = vgg16(weights=None).features[:-1]  # LPIPS looks at nothing behind the last pooling
        else:
            network = timm.create_model("efficientnet_lite0", features_only=True, out_indices=STAGES)
        return _forward_flops(network, (image_size_px, image_size_px))


@lru_cache(maxsize=16)
def feature_flops(name: str) -> FeatureFlops:
    """Count a network of `load_features`, at the size to which it resizes images."""
    with META:
        if name == INCEPTION:
            from torchvision.models import inception_v3

            network: Any = inception_v3(weights=None, aux_logits=False, init_weights=False)
            return FeatureFlops(per_image=_forward_flops(network, (299, 299)), channels=2048)
        if name == EFFICIENTNET_LITE0:
            network = timm.create_model("efficientnet_lite0")
            return FeatureFlops(per_image=_forward_flops(network, (224, 224)), channels=network.num_features)
        network = timm.create_model(name, num_classes=0)
        size = timm.data.resolve_model_data_config(network)["input_size"][-2:]
        return FeatureFlops(per_image=_forward_flops(network, size), channels=network.num_features)


@lru_cache(maxsize=16)
def teacher_flops(name: str, grid: tuple[int, int]) -> FeatureFlops:
    """Count REPA's teacher, at the size that gives it the generator's grid; see `eqvae.networks.teachers`."""
    with META:
        if name == EFFICIENTNET_LITE0:
            network: Any = timm.create_model("efficientnet_lite0", features_only=True, out_indices=(3,))
            (channels,), (stride,) = network.feature_info.channels(), network.feature_info.reduction()
            flops = _forward_flops(network, (stride * grid[0], stride * grid[1]))
            return FeatureFlops(per_image=flops, channels=channels)
        network = timm.create_model(name, num_classes=0)
        has_patches = hasattr(network, "patch_embed")
        stride = network.patch_embed.patch_size[0] if has_patches else network.feature_info[-1]["reduction"]
        size = (stride * grid[0], stride * grid[1])
        if has_patches:
            network = timm.create_model(name, num_classes=0, img_size=size)
        return FeatureFlops(per_image=_forward_flops(network, size), channels=network.num_features)


@lru_cache(maxsize=64)
def backbone_flops(config: BackboneConfig, projector_depth: int | None = None) -> float:
    """Count a generator's forward pass."""
    if projector_depth is None or not isinstance(config, TransformerConfig):
        return float(transformer_flops(config))
    with META:
        return float(count_flops(config.build(), *config.example(), projector_depth))


def area_of(tau: Transform) -> float:
    """Say how large a transformed image is."""
    if isinstance(tau, Compose):
        area = 1.0
        for part in tau.parts:
            area *= area_of(part)
        return area
    return float(tau.vertical * tau.horizontal) if isinstance(tau, Scale) else 1.0


def _forward_flops(network: nn.Module, size: tuple[int, ...]) -> float:
    with torch.no_grad():
        return float(count_flops(network.eval(), torch.empty(1, 3, *size, device=META)))
