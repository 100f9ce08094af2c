"""Discriminators in files: those that `eqvae finetune` exports, and PatchGANs in checkpoints of anybody's making."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eqvae.artifacts.files import expanded, load_strictly, read_json, read_tensors, write_json, write_tensors
from eqvae.artifacts.names import AUTOENCODER, CHECKPOINT, CONFIG, DISCRIMINATOR, DISCRIMINATOR_WEIGHTS
from eqvae.artifacts.weights import NamedTensors, read_named
from eqvae.errors import UserError
from eqvae.losses.adversarial import AdversarialConfig
from eqvae.losses.discriminators import Discriminator, FeatureDiscriminator, PatchDiscriminator, build_discriminator
from eqvae.networks.feature_maps import FEATURES_FLAG, WEIGHTS_FLAG, FeatureMaps, load_feature_maps
from eqvae.runtime.journal import say_once

_KINDS = (
    "Give an eqvae run that trained one, the folder that it exported, or a checkpoint of LDM, taming-transformers or "
    "LlamaGen with the discriminator's 'main.0.weight'; files pruned for use hold none"
)

_FIRST = re.compile(r"((?:.*\.)?(?:main|discriminator)\.)0\.weight")
"""Of PatchGAN elsewhere, and in a checkpoint of our own."""


def begin_discriminator(config: AdversarialConfig, seed: int, image_channels: int = 3) -> Discriminator | None:
    """Load the discriminator that a run begins with, or build one; None where none is wanted."""
    if config.adversarial_weight == 0:
        return None
    weights = config.discriminator_features_weights
    if config.discriminator is not None:
        return load_discriminator(config.discriminator, features_weights=weights, image_channels=image_channels)
    features = config.discriminator_features
    maps = None if features is None else load_feature_maps(features, weights)
    return build_discriminator(seed, maps, image_channels=image_channels)


def save_discriminator(discriminator: Discriminator, folder: Path) -> None:
    """Write what is trained, PatchGAN under its published names, and what it takes to build it again."""
    state = discriminator.learned.state_dict()
    named = {discriminator.prefix + name: tensor for name, tensor in state.items()}
    write_tensors(folder / DISCRIMINATOR_WEIGHTS, named, digest=True)
    write_json(folder / CONFIG, discriminator.description() | {"fingerprint": discriminator.fingerprint()})


def load_discriminator(source: str, *, features_weights: Path | None = None, image_channels: int = 3) -> Discriminator:
    """Load an exported discriminator, or PatchGAN out of a checkpoint, and say in one line what was found."""
    path = expanded(source)
    if not path.exists():
        raise UserError(f"--discriminator '{source}' does not exist", "Check the path")
    folder = _find_exported(path)
    if folder is not None:
        found, where = _load_exported(folder, features_weights, image_channels), f"'{folder}'"
    else:
        file = path / CHECKPOINT if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"--discriminator '{source}' holds no discriminator", _KINDS)
        named = read_named(file)
        prefix = _find_prefix(named)
        state = named.take({name.removeprefix(prefix): name for name in named.getters if name.startswith(prefix)})
        found, where = _load_patchgan(state, file, image_channels), f"'{prefix.removesuffix('.')}' of '{file}'"
    if features_weights is not None and not isinstance(found, FeatureDiscriminator):
        raise UserError(f"{WEIGHTS_FLAG} has no place: --discriminator '{source}' is a {found.title}", "Leave it out")
    count = sum(parameter.numel() for parameter in found.learned.parameters())
    say_once(f"discriminator: {found.title} ({count:,} parameters), {where}")
    return found


def _find_exported(path: Path) -> Path | None:
    """Find an exported discriminator in a run, in its autoencoder, or where the path leads."""
    if path.name in (CONFIG, DISCRIMINATOR_WEIGHTS):
        path = path.parent
    for folder in (path / AUTOENCODER / DISCRIMINATOR, path / DISCRIMINATOR, path):
        if (folder / CONFIG).is_file() and (folder / DISCRIMINATOR_WEIGHTS).is_file():
            return folder
    return None


def _load_exported(folder: Path, features_weights: Path | None, image_channels: int) -> Discriminator:
    config = read_json(folder / CONFIG)
    kind = {each.architecture: each for each in (PatchDiscriminator, FeatureDiscriminator)}.get(
        str(config.get("architecture"))
    )
    if kind is None:
        raise UserError(f"'{folder / CONFIG}' names no discriminator ('architecture')", _KINDS)
    file = folder / DISCRIMINATOR_WEIGHTS
    # Copied, so that they lie in memory as tensors do: in a file's own order sums differ in the last digit.
    state = {name.removeprefix(kind.prefix): tensor.clone() for name, tensor in read_tensors(file)[0].items()}
    if kind is PatchDiscriminator:
        return _load_patchgan(state, file, image_channels)
    maps = _load_features(config, folder, features_weights)
    found = build_discriminator(0, maps)
    load_strictly(found.learned, state, source=str(file), model_name=found.title, mend="Export it again")
    return found


def _load_features(config: Mapping[str, object], folder: Path, weights: Path | None) -> FeatureMaps:
    """Load the frozen network that an exported discriminator's heads were trained on."""
    name = config.get("features")
    if not isinstance(name, str):
        raise UserError(f"'{folder / CONFIG}' names no features", "Export it again")
    maps = load_feature_maps(name, weights)
    if maps.fingerprint() != config.get("features_fingerprint"):
        raise UserError(
            f"The heads in '{folder}' were trained on other weights of {name} than are at hand",
            f"Name those with {WEIGHTS_FLAG}, or begin with new heads: {FEATURES_FLAG} {name}",
        )
    return maps


def _find_prefix(named: NamedTensors) -> str:
    """Find what stands before PatchGAN's names in a file; never one of two silently."""
    prefixes = [match[1] for name in named.getters if (match := _FIRST.fullmatch(name)) is not None]
    if not prefixes:
        raise UserError(f"'{named.path}' holds no discriminator", _KINDS)
    if len(prefixes) > 1:
        titles = ", ".join(f"'{prefix.removesuffix('.')}'" for prefix in prefixes)
        raise UserError(
            f"'{named.path}' holds {len(prefixes)} discriminators: {titles}",
            "Save the one that you want in a file of its own",
        )
    return prefixes[0]


def _load_patchgan(state: Mapping[str, Tensor], file: Path, image_channels: int) -> PatchDiscriminator:
    """Build PatchGAN in the sizes that its weights have."""
    first = state.get("0.weight")
    width = len(first) if first is not None and first.ndim else 1
    num_layers = max(sum(name.endswith(".running_mean") for name in state), 1)
    with torch.device("meta"):
        found = PatchDiscriminator(width, num_layers, image_channels)
    kind = "colour pictures" if image_channels == 3 else f"pictures of {image_channels} channels"
    load_strictly(
        found,
        state,
        source=str(file),
        model_name=found.title,
        mend=f"What is read is pix2pix's discriminator of {kind}, with batch normalization",
    )
    return found
