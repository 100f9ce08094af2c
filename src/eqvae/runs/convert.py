"""`eqvae convert SOURCE DESTINATION`: an autoencoder or a generator in another published layout."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from eqvae.artifacts.files import check_writable, replace_folder, to_plain, write_json
from eqvae.artifacts.names import CONFIG
from eqvae.artifacts.records import Converted
from eqvae.artifacts.weights import WhichWeights
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.convert import convert_autoencoder
from eqvae.autoencoders.loading import choose_weights
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import GeneratorCard, write_generator
from eqvae.generators.families import find_recipe
from eqvae.generators.official import describe_official, read_official, write_official
from eqvae.latents.cache import fixed_normalization
from eqvae.runtime.journal import write_environment


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write an autoencoder or a generator in another published layout; weights stay what they are."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """An autoencoder: preset, hub id or path. Or a generator: an official file of DiT, SiT, REPA, GAT or MaskGIT,
    or a run of `eqvae train`."""

    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """What is not there yet: a folder for `diffusers` and for an official generator, a `.safetensors` file for `ldm`, a
    `.pt` file for `official`."""

    to: Literal["diffusers", "ldm", "official", "run"] = "run"
    """`diffusers`: a folder that `from_pretrained` loads. `ldm`: a file with the names of CompVis' latent-diffusion
    and taming-transformers, without prefix. `official`: a generator as the code of DiT, SiT, REPA, GAT or MaskGIT loads
    it. `run`: an official generator as a run that `eqvae sample` and `eqvae train --init` take."""

    recipe: str | None = None
    """What an official generator is, for example `dit-xl-2`."""

    autoencoder: str | None = None
    """Of an official generator: the autoencoder whose latents it models, for example `sd-vae-ft-ema`."""

    weights: WhichWeights | None = None
    """Of a checkpoint that holds both: `ema`, averaged, or `raw`. None: the averaged ones, which one line says; of an
    official generator, both."""

    normalization: str | None = None
    """Of an official generator: `fixed:0.18215` if its latents were multiplied by this; None: by the scaling factor of
    the autoencoder's config."""


def convert(config: ConvertConfig) -> Converted:
    """Write a model in another published layout; weights keep their values, bit for bit.

    Args:
        config: What to convert, and into what. Nothing may be at its destination yet; it appears whole, or not at all.

    Returns:
        Where the result is, and what whoever loads it has to know or to set.

    Raises:
        UserError: If the destination is taken or unfit, the source can't be loaded, or the layout can't express it.
    """
    if config.to == "run":
        return _import_generator(config)
    if config.recipe is not None:
        raise UserError(f"--recipe {config.recipe} is for an official generator", f"Leave it out, or --to {config.to}")
    if config.to == "official":
        return _export_generator(config)
    return convert_autoencoder(choose_weights(config.source, config.weights), config.destination, config.to)


def command(config: ConvertConfig) -> str:
    """Convert, and say where the result is and what its user has to set."""
    converted = convert(config)
    return "\n".join([str(converted.path), *(f"  {line}" for line in converted.advice)])


def _import_generator(config: ConvertConfig) -> Converted:
    """Write an official generator as a run."""
    if config.recipe is None:
        raise UserError(
            "--recipe is missing, which an official generator needs",
            "An autoencoder goes --to diffusers or ldm, a run --to official",
        )
    recipe = find_recipe(config.recipe)
    if config.autoencoder is None:
        raise UserError("--autoencoder is missing", "Name the one whose latents the generator models")
    _check_destination(config.destination)
    found, autoencoder = read_official(Path(config.source), config.weights), load_autoencoder(config.autoencoder)
    weights = {which: recipe.from_published(state) for which, state in found.items()}
    shift, scale = _normalization(config.normalization, autoencoder)
    card = describe_official(weights, recipe, autoencoder, shift=shift, scale=scale, source=config.source)

    def fill(folder: Path) -> None:
        write_generator(folder, card, weights)
        write_json(folder / CONFIG, to_plain(config) | {"command": "convert"})
        write_environment(folder, device=torch.device("cpu"), seed=None)

    replace_folder(config.destination, fill)
    return _describe(card, config.destination)


def _export_generator(config: ConvertConfig) -> Converted:
    """Write a run's generator as its published code loads it."""
    _check_destination(config.destination)
    if config.destination.suffix not in (".pt", ".pth"):
        raise UserError(f"DESTINATION '{config.destination}' is to be an official file", "Let its name end in .pt")
    card = write_official(Path(config.source), config.destination)
    return _describe(card, config.destination)


def _check_destination(destination: Path) -> None:
    if os.path.lexists(destination):
        raise UserError(f"DESTINATION '{destination}' exists", "Choose another name, or remove it")
    check_writable(destination.absolute().parent, "DESTINATION's folder")


def _normalization(name: str | None, autoencoder: Autoencoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of each channel as published models have them: from the autoencoder's config, or as named."""
    if isinstance(autoencoder, DiscreteAutoencoder):
        return (), ()
    channels = autoencoder.latent_channels
    if name is not None:
        normalization = fixed_normalization(name, channels)
        return tuple(normalization.shift.tolist()), tuple(normalization.scale.tolist())
    model: Any = autoencoder.model
    factor = model.config.get("scaling_factor") or 1.0
    shift = model.config.get("latents_mean") or [model.config.get("shift_factor") or 0.0] * channels
    scale = [std / factor for std in model.config.get("latents_std") or [1.0] * channels]
    return tuple(shift), tuple(scale)


def _describe(card: GeneratorCard, path: Path) -> Converted:
    """Say what a user of the weights must set."""
    latents = card.transformer.latents
    lines = [f"{card.recipe}: {latents.num_classes} classes, {card.image_size_px} px, decoder {card.autoencoder}"]
    if card.scale and len({*card.scale}) == 1 and not any(card.shift):
        lines.append(f"its latents are multiplied by {1 / card.scale[0]:.6g}")
    elif card.scale:
        lines.append(f"its latents are normalized by shift {list(card.shift)} and scale {list(card.scale)}")
    if card.interpolant is not None:
        lines.append(f"path {card.interpolant.path}, prediction {card.interpolant.prediction}")
    return Converted(path=path, advice=tuple(lines))
