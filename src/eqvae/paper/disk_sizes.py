"""Bytes that a stage leaves on disk, worked out on PyTorch's meta device by the code that would write them.

Tensors and headers count; pictures, journals and other small text do not.
"""

import copy
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eqvae.autoencoders.protocol import DiscreteAutoencoder
from eqvae.generators.families import PUBLISHED_LATENTS, BackboneConfig, find_recipe
from eqvae.latents.shards import DTYPES, MIRRORED
from eqvae.latents.writing import coding_of, encode_images
from eqvae.networks.features import INCEPTION, NUM_SPATIAL_CHANNELS
from eqvae.paper.flop_counts import META, Architecture, feature_flops, meta_autoencoder
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.training.autoencoder_state import build_state as build_finetuning_state
from eqvae.training.generator_step import build_state as build_training_state

_ANY_RECIPE = "dit-s-2"

_NOTE_BYTES = 400
"""About so much text says in a shard's header what made it, and its digest."""

_SUMS_BYTES = 75
"""And so much, for each channel of moments, what they sum to."""

_SPATIAL_FEATURES = 17 * 17 * NUM_SPATIAL_CHANNELS
"""Inception's, of which sFID keeps a covariance too."""

_ARRAY_BYTES = 128 + 130
"""Of an array in an .npz, besides its numbers: NumPy's header, and two entries of the archive."""


@lru_cache(maxsize=32)
def finetuning_bytes(config: FinetuneConfig, architecture: Architecture) -> int:
    """Size a fine-tuning run: checkpoint and exported weights."""
    autoencoder, training = copy.deepcopy(meta_autoencoder(architecture)).requires_grad_(True), config.training
    state = build_finetuning_state(autoencoder, training, META)
    for parameter in autoencoder.encoder_parameters() if training.freeze_encoder else ():
        parameter.requires_grad_(False)
    if isinstance(autoencoder, DiscreteAutoencoder) and (training.freeze_encoder or training.codes.codebook == "ema"):
        autoencoder.codebook.requires_grad_(False)
    _step(autoencoder, state.optimizer)
    if state.discriminator is not None and state.discriminator_optimizer is not None:
        _step(state.discriminator, state.discriminator_optimizer)
    return _safetensors_bytes(state.tensors()) + _safetensors_bytes(autoencoder.state_dict())


@lru_cache(maxsize=32)
def cache_bytes(config: EncodeConfig, architecture: Architecture, num_images: int, *, has_labels: bool) -> int:
    """Size a latent cache."""
    autoencoder = meta_autoencoder(architecture)
    with torch.no_grad():
        kept = encode_images(autoencoder, torch.empty(1, 3, config.image_size, config.image_size, device=META))
    coding = coding_of(autoencoder, config.dtype)
    dtype = DTYPES[coding.dtype]
    note_bytes = _NOTE_BYTES + (_SUMS_BYTES * autoencoder.latent_channels if coding.kind == "moments" else 0)

    def shard_bytes(count: int) -> int:
        tensors = {}
        for suffix in ("", MIRRORED) if config.mirror else ("",):
            for name, values in kept.items():
                tensors[name + suffix] = torch.empty(count, *values.shape[1:], dtype=dtype, device=META)
        for name in ("source_indices", "labels") if has_labels else ("source_indices",):
            tensors[name] = torch.empty(count, dtype=torch.int64, device=META)
        return _safetensors_bytes(tensors) + note_bytes

    num_whole, rest = divmod(num_images, config.shard_size)
    return num_whole * shard_bytes(config.shard_size) + (shard_bytes(rest) if rest else 0)


@lru_cache(maxsize=64)
def training_bytes(transformer: BackboneConfig, *, posthoc_ema: bool, num_watches: int) -> int:
    """Size a generator's training run: checkpoint, both exported weights, and snapshots of post-hoc averages."""
    with META:
        network = transformer.build()
    # Neither what it is trained for nor how changes the size of its state, but for the averages.
    config = TrainConfig(recipe=_ANY_RECIPE, latents=Path(), out=Path(), posthoc_ema=posthoc_ema).resolved()
    state = build_training_state(network, find_recipe(_ANY_RECIPE).objective(PUBLISHED_LATENTS), config, META)
    _step(network, state.optimizer)
    num_copies = 2 + (2 * num_watches if posthoc_ema else 0)
    return _safetensors_bytes(state.tensors()) + num_copies * _safetensors_bytes(network.state_dict())


def sample_set_bytes(num_samples: int, image_size_px: int, *, has_labels: bool) -> int:
    """Size a sample set: an `.npz` that is not compressed. While its parts are joined it needs three times this."""
    arrays = [3 * num_samples * image_size_px**2] + ([8 * num_samples] if has_labels else [])
    return sum(size + _ARRAY_BYTES for size in arrays)


def pictures_bytes(num_pictures: int, image_size_px: int, architecture: Architecture) -> int:
    """Size the images and latents that `eqvae evaluate` keeps for the report."""
    autoencoder = meta_autoencoder(architecture)
    latent_bytes = 4 * autoencoder.latent_channels * (image_size_px // autoencoder.stride) ** 2
    num_wholes = 2 + 2 * (0.25 + 1)  # the image, its reconstruction, and two of each: half as large, turned
    return num_pictures * (latent_bytes + int(3 * image_size_px**2 * num_wholes))


def statistics_bytes(features: str, num_images: int) -> int:
    """Size the saved statistics of a reference: means and covariances in float64, features in float32."""
    channels = feature_flops(features).channels
    spatial = _SPATIAL_FEATURES * (_SPATIAL_FEATURES + 1) if features == INCEPTION else 0
    return 8 * (channels * (channels + 1) + spatial) + 4 * num_images * channels


def _step(module: nn.Module, optimizer: Optimizer) -> None:
    """Let an optimizer make its moments, of what is trained."""
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()


def _safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of a safetensors file: 8 bytes, a header in JSON, the numbers."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    return 8 + len(json.dumps(header, separators=(",", ":"))) + end
