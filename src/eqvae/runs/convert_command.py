"""`eqvae convert SOURCE DESTINATION --to diffusers|ldm`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvae.autoencoders.convert import Format, convert
from eqvae.runs.arguments import parse


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


def command(arguments: Sequence[str]) -> None:
    """Convert, and say where the result is and what its user has to set."""
    config = parse(ConvertConfig, "convert", arguments)
    converted = convert(config.source, config.destination, config.to)
    print(converted.path)  # noqa: T201
    for line in converted.advice:
        print(f"  {line}")  # noqa: T201
