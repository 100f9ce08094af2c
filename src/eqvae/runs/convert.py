"""`eqvae convert SOURCE DESTINATION --to FORMAT`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvae.artifacts import Converted
from eqvae.autoencoders.convert import Format, convert_autoencoder


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write an autoencoder in diffusers' format, or under CompVis' parameter names; weights stay what they are."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Preset, hub id or path: a diffusers folder, an eqvae run, an LDM or VQ-GAN file, a TAESD pair."""

    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """A new folder for `diffusers`, a new `.safetensors` file for `ldm`."""

    to: Format
    """`diffusers`: a folder that `from_pretrained` loads. `ldm`: a file with the names of CompVis' latent-diffusion
    and taming-transformers, without prefix."""


def convert(config: ConvertConfig) -> Converted:
    """Write a model in another published layout; weights keep their values, bit for bit.

    Args:
        config: What to convert, and into what. Nothing may be at its destination yet; it appears whole, or not at all.

    Returns:
        Where the result is, and what whoever loads it has to know or to set.

    Raises:
        UserError: If the destination is taken or unfit, the source can't be loaded, or the layout can't express it.
    """
    return _CONVERTERS[config.to](config)


def command(config: ConvertConfig) -> str:
    """Convert, and say where the result is and what its user has to set."""
    converted = convert(config)
    return "\n".join([str(converted.path), *(f"  {line}" for line in converted.advice)])


def _convert_autoencoder(config: ConvertConfig) -> Converted:
    return convert_autoencoder(config.source, config.destination, config.to)


_CONVERTERS: dict[str, Callable[[ConvertConfig], Converted]] = {
    "diffusers": _convert_autoencoder,
    "ldm": _convert_autoencoder,
}
"""The layout that is asked for says what kind of model it holds."""
