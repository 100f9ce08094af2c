"""`eqvae convert SOURCE DESTINATION`: an autoencoder or a generator in another published layout."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from eqvae.artifacts.files import check_writable, replace_folder, to_plain, write_json
from eqvae.artifacts.names import CONFIG
from eqvae.artifacts.records import Converted
from eqvae.artifacts.weights import WhichWeights, compare_names
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.convert import Format, convert_autoencoder
from eqvae.autoencoders.factors import Fold, Normalization, configured
from eqvae.autoencoders.loading import choose_weights
from eqvae.autoencoders.padding import padding_mode_of
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import GeneratorCard, Weights, load_transformer, read_generator, write_generator
from eqvae.generators.dit_pipeline import check_pipeline, is_pipeline, read_pipeline, write_pipeline
from eqvae.generators.families import find_recipe
from eqvae.generators.official import (
    describe_official,
    largest_difference,
    read_noted_normalization,
    read_official,
    write_official,
)
from eqvae.latents.cache import fixed_normalization
from eqvae.runtime.journal import write_environment

Target = Literal[Format, "official", "dit-pipeline", "run"]

_READS: dict[str, tuple[str, ...]] = {
    "run": ("recipe", "autoencoder", "weights", "normalization"), "official": (), "dit-pipeline": ("autoencoder",)
}  # fmt: skip
"""What is asked for with a generator's target; an autoencoder's takes the others."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write an autoencoder or a generator in another published layout; weights stay what they are."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """An autoencoder: preset, hub id or path. Or a generator: an official file of DiT, SiT, REPA, GAT or MaskGIT,
    or a run of `eqvae train`."""

    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """What is not there yet: a folder for `diffusers`, `taesd`, `dit-pipeline` and `run`, else a file: `.safetensors`
    or `.ckpt` for `ldm` and `stability`, `.safetensors` for `comfyui`, `.ckpt` for `taming` and `mar`, `.pt` for
    `va-vae` and `official`."""

    to: Target = "run"
    """Autoencoders. `diffusers`: a folder that `from_pretrained` loads. `ldm`: a file with the names of CompVis'
    latent-diffusion and taming-transformers, without prefix. `stability`: the same behind `first_stage_model.`.
    `comfyui`: for its node Load VAE. `taming`: a VQ-GAN's checkpoint. `taesd`: encoder and decoder in files of their
    own. `mar`, `va-vae`: for LTH14/mar and hustvl/LightningDiT.
    Generators. `official`: as the code of DiT, SiT, REPA, GAT or MaskGIT loads it. `dit-pipeline`: a DiT with scheduler
    and autoencoder as a folder of diffusers' `DiTPipeline`. `run`: an official generator, or such a folder, as a run
    that `eqvae sample` and `eqvae train --init` take."""

    fold: Fold | None = None
    """Of an autoencoder: let the layers next to the latent take scaling and shift factors in, so that no pipeline
    leaves them out. Latents are then normalized (`unit`), or as those of `sd`, `sdxl`, `sd3`, `flux`, whose factors
    ComfyUI applies. None: weights stay what they are, and factors go where the format has a place for them."""

    recipe: str | None = None
    """What an official generator is, for example `dit-xl-2`; a `DiTPipeline` says it itself."""

    autoencoder: str | None = None
    """Of a generator: the autoencoder whose latents it models, for example `sd-vae-ft-ema`. None: the one in a
    `DiTPipeline`'s folder, or that of the run."""

    weights: WhichWeights | None = None
    """Of a checkpoint that holds both: `ema`, averaged, or `raw`. None: the averaged ones, which one line says; of an
    official generator, both."""

    channels: int | None = None
    """Of an autoencoder: images of so many channels instead, 1 for grey; a `diffusers` folder where --to is not given.
    Its first and its last convolution begin as the mean of what they were: a start for `eqvae finetune`."""

    normalization: str | None = None
    """Of an official generator: `fixed:0.18215` if its latents were multiplied by this; None: as `--to official` noted
    in its file, else by the scaling factor of the autoencoder's config."""


def convert(config: ConvertConfig) -> Converted:
    """Write a model in another published layout; weights keep their values, bit for bit.

    Args:
        config: What to convert, and into what. Nothing may be at its destination yet; it appears whole, or not at all.

    Returns:
        Where the result is, and what whoever loads it has to know or to set.

    Raises:
        UserError: If the destination is taken or unfit, the source can't be loaded, or the layout can't express it.
    """
    to = "diffusers" if config.channels is not None and config.to == "run" else config.to
    for name in ("recipe", "autoencoder", "weights", "normalization", "fold", "channels"):
        value = getattr(config, name)
        if value is not None and name not in _READS.get(to, ("weights", "fold", "channels")):
            owner = "an official generator" if name in _READS["run"] else "an autoencoder"
            raise UserError(f"--{name} {value} is for {owner}, not for --to {to}", "Leave it out")
    if to == "run":
        return _import_generator(config)
    if to == "official":
        return _export_generator(config)
    if to == "dit-pipeline":
        return _export_pipeline(config)
    source = choose_weights(config.source, config.weights)
    return convert_autoencoder(source, config.destination, to, folded=config.fold, num_channels=config.channels)


def command(config: ConvertConfig) -> str:
    """Convert, and say where the result is, what its user has to set, and that it is the same model."""
    converted = convert(config)
    same = f"largest difference of outputs, loaded again: {converted.largest_difference:.2g}"
    return "\n".join([str(converted.path), *(f"  {line}" for line in (converted.keys, *converted.advice, same))])


def _import_generator(config: ConvertConfig) -> Converted:
    """Write an official generator, or that of a diffusers pipeline, as a run."""
    source = Path(config.source)
    if is_pipeline(source):
        return _import_pipeline(config, source)
    if config.recipe is None:
        raise UserError(
            "--recipe is missing, which an official generator needs",
            "An autoencoder goes --to diffusers, ldm and others, a run --to official or dit-pipeline",
        )
    recipe = find_recipe(config.recipe)
    if config.autoencoder is None:
        raise UserError("--autoencoder is missing", "Name the one whose latents the generator models")
    _check_destination(config.destination)
    found, autoencoder = read_official(source, config.weights), load_autoencoder(config.autoencoder)
    weights = {which: recipe.from_published(state) for which, state in found.items()}
    noted = None
    if config.normalization is None and not isinstance(autoencoder, DiscreteAutoencoder):
        noted = read_noted_normalization(source, autoencoder.latent_channels)
    shift, scale = noted or _normalization(config.normalization, autoencoder)
    card = describe_official(weights, recipe, autoencoder, shift=shift, scale=scale, source=config.source)
    return _write_run(config, card, weights, list(found["ema"]))


def _import_pipeline(config: ConvertConfig, folder: Path) -> Converted:
    """Write the generator of a `DiTPipeline` as a run; the pipeline knows no shift of latents."""
    _check_destination(config.destination)
    found = read_pipeline(folder)
    if config.recipe not in (None, found.recipe):
        raise UserError(f"--recipe {config.recipe} is not what '{folder}' holds: {found.recipe}", "Leave it out")
    autoencoder = load_autoencoder(config.autoencoder or str(folder / "vae"))
    model: Any = autoencoder.model
    factor = config.normalization or f"fixed:{model.config.get('scaling_factor') or 1.0}"
    shift, scale = _normalization(factor, autoencoder)
    weights: dict[Weights, dict[str, Tensor]] = {"ema": found.weights}
    card = describe_official(
        weights, find_recipe(found.recipe), autoencoder, shift=shift, scale=scale, source=config.source
    )
    return _write_run(config, replace(card, class_names=found.class_names), weights, found.names)


def _write_run(
    config: ConvertConfig, card: GeneratorCard, weights: Mapping[Weights, Mapping[str, Tensor]], names: Sequence[str]
) -> Converted:
    """Write a run, load it again, and compare."""

    def fill(folder: Path) -> None:
        write_generator(folder, card, weights)
        write_json(folder / CONFIG, to_plain(config) | {"command": "convert"})
        write_environment(folder, device=torch.device("cpu"), seed=None)

    replace_folder(config.destination, fill)
    given = load_transformer(card.transformer, weights["ema"], source=config.source)
    written = read_generator(config.destination).transformer
    return Converted(
        path=config.destination,
        advice=_advice(card),
        keys=compare_names(names, list(written.state_dict()), written.num_parameters()),
        largest_difference=largest_difference(given, written),
    )


def _export_generator(config: ConvertConfig) -> Converted:
    """Write a run's generator as its published code loads it."""
    _check_destination(config.destination)
    if config.destination.suffix not in (".pt", ".pth"):
        raise UserError(f"DESTINATION '{config.destination}' is to be an official file", "Let its name end in .pt")
    card = write_official(Path(config.source), config.destination)
    given, published = read_generator(Path(config.source)).transformer, read_official(config.destination)["ema"]
    state = card.kind.from_published(published)
    written = load_transformer(card.transformer, state, source=str(config.destination))
    return Converted(
        path=config.destination,
        advice=_advice(card),
        keys=compare_names(list(given.state_dict()), list(published), given.num_parameters()),
        largest_difference=largest_difference(given, written),
    )


def _export_pipeline(config: ConvertConfig) -> Converted:
    """Write a run's DiT and its decoder as a folder of diffusers' `DiTPipeline`."""
    _check_destination(config.destination)
    generator = read_generator(Path(config.source))
    card = generator.card
    autoencoder = load_autoencoder(config.autoencoder or card.autoencoder)
    autoencoder.check_decodes(
        f"'{config.source}' models latents of",
        made_by=card.autoencoder,
        fingerprint=card.autoencoder_fingerprint,
        encoder_fingerprint=card.encoder_fingerprint,
    )
    names = write_pipeline(generator, autoencoder, config.destination, source=config.source)
    check = check_pipeline(config.destination, generator, autoencoder)
    advice = [
        "load it with diffusers.DiTPipeline.from_pretrained, and give it DiT's own times, without which its "
        f"predictions differ by {check.without_published_times:.2g}:",
        "for block in pipeline.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0",
    ]
    if padding_mode_of(autoencoder) == "reflect":
        advice.append("its vae pads by reflection: eqvae.set_padding_mode(pipeline.vae, 'reflect')")
    if not Normalization(card.shift, card.scale).is_scalar:
        advice.append("its vae's weights have taken in shift and scale: latents are normalized, scaling_factor is 1")
    return Converted(
        path=config.destination,
        advice=(*advice, *_advice(card)),
        keys=compare_names(list(generator.transformer.state_dict()), names, generator.transformer.num_parameters()),
        largest_difference=max(check.predictions, check.images),
    )


def _check_destination(destination: Path) -> None:
    if os.path.lexists(destination):
        raise UserError(f"DESTINATION '{destination}' exists", "Choose another name, or remove it")
    check_writable(destination.absolute().parent, "DESTINATION's folder")


def _normalization(name: str | None, autoencoder: Autoencoder) -> Normalization:
    """Shift and scale of each channel as published models have them: from the autoencoder's config, or as named."""
    if isinstance(autoencoder, DiscreteAutoencoder):
        return Normalization((), ())
    if name is None:
        return configured(autoencoder)
    normalization = fixed_normalization(name, autoencoder.latent_channels)
    return Normalization(tuple(normalization.shift.tolist()), tuple(normalization.scale.tolist()))


def _advice(card: GeneratorCard) -> tuple[str, ...]:
    """Say what a user of the weights must set."""
    latents = card.transformer.latents
    lines = [f"{card.recipe}: {latents.num_classes} classes, {card.image_size_px} px, decoder {card.autoencoder}"]
    if card.scale and Normalization(card.shift, card.scale).is_scalar:
        lines.append(f"its latents are multiplied by {1 / card.scale[0]:.6g}")
    elif card.scale:
        lines.append(f"its latents are normalized by shift {list(card.shift)} and scale {list(card.scale)}")
    if card.interpolant is not None:
        lines.append(f"path {card.interpolant.path}, prediction {card.interpolant.prediction}")
    return tuple(lines)
