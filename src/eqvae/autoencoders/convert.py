"""One autoencoder in another format: a folder of diffusers, a file under CompVis' names, a pair of TAESD's.

Only diffusers' config has a place for scaling and shift factors; in other formats they stand in a note.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

import torch

from eqvae.artifacts.files import (
    check_writable,
    expanded,
    read_json,
    replace_folder,
    write_atomically,
    write_json,
    write_tensors,
)
from eqvae.artifacts.names import AUTOENCODER, CONFIG, CONVERSION, MODEL_CARD
from eqvae.artifacts.records import Converted
from eqvae.artifacts.weights import compare_names
from eqvae.autoencoders.channels import load_with_channels
from eqvae.autoencoders.compvis import FILE_FORMATS, check_class, describe, has_quant_convs, loading_advice, modelspec
from eqvae.autoencoders.factors import Fold, comfyui_advice, configured, fold, pipeline_advice
from eqvae.autoencoders.layouts import (
    Published,
    diffusers_to_ldm,
    diffusers_to_pair,
    find_pair,
    is_ldm,
    pair_to_diffusers,
)
from eqvae.autoencoders.loading import choose_weights, load_autoencoder, split_weights
from eqvae.autoencoders.notes import NOTE, PAIR, factors_of, pair_identity, read_note, read_pair_note
from eqvae.autoencoders.presets import PRESETS, UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError

Format = Literal["diffusers", "ldm", "stability", "comfyui", "taming", "taesd", "mar", "va-vae"]

_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
_TINY_CLASSES = ("AutoencoderTiny", "PooledAutoencoderTiny")
_PAIR_NAMES = ("taesdxl", "taesd3", "taef1", "taef2", "taesd")
"""What their author calls his models, longer names first."""

_OF_ARCHITECTURE = (
    "in_channels", "out_channels", "encoder_block_out_channels", "decoder_block_out_channels", "act_fn", "upsample_fn",
    "upsampling_scaling_factor", "num_encoder_blocks", "num_decoder_blocks",
)  # fmt: skip
"""Fields of a tiny autoencoder's config that TAESD's author's code has written into it."""


def convert_autoencoder(
    source: str, destination: Path, to: Format, *, folded: Fold | None = None, num_channels: int | None = None
) -> Converted:
    """Write an autoencoder in another format; weights are fp32, and their values stay what they were, bit for bit.

    `source` is anything that `load_autoencoder` takes. `folded`: the layers next to the latent take its factors in.
    `num_channels`: of its images, for which the first and the last convolution are made anew.
    """
    _check_destination(destination, to)
    name = source.removeprefix(UNTRAINED)
    if name in PRESETS:  # told before gigabytes are fetched
        _check_class(source, PRESETS[name].architecture.class_name, to)
    given = load_autoencoder(source) if num_channels is None else load_with_channels(source, num_channels)
    autoencoder, (source, _) = given, split_weights(source)
    model: Any = autoencoder.model
    _check_class(source, type(model).__name__, to)
    note = _read_note(source)
    knows_scaling = "scaling_factor" in note or not is_ldm(_model_names(given))
    if folded is not None:
        if not knows_scaling:
            raise UserError(f"'{source}' has no scaling factor to fold", "Give a diffusers folder whose config has one")
        autoencoder = fold(autoencoder, configured(autoencoder), folded)
    card = note.get("card") or _read_card(source)
    kept_card = card if num_channels is None and folded is None else None  # figures are not those of other weights
    if to == "diffusers":
        names, advice = _write_diffusers(autoencoder, destination, kept_card, knows_scaling=knows_scaling)
    elif to == "taesd":
        names, advice = _write_pair(autoencoder, destination, kept_card, source)
    else:
        names, advice = _write_file(autoencoder, destination, to, kept_card, source, knows_scaling=knows_scaling)
    if num_channels is not None:
        advice = [_start(source), *advice]
    if card is not None and kept_card is None:
        advice = [*advice, f"{MODEL_CARD} is left out: its figures are of other weights"]
    written = load_autoencoder(choose_weights(str(destination.absolute()), "raw"))  # there are no others
    return Converted(
        path=destination,
        advice=tuple(advice),
        keys=compare_names(_model_names(given), names, given.num_parameters()),
        largest_difference=_largest_difference(given, written, folded=folded is not None),
    )


def _start(source: str) -> str:
    """Say what weights of other channels are."""
    if source.startswith(UNTRAINED):
        return "random weights: a start for 'eqvae finetune'"
    return f"each channel begins as the mean of those of '{source}': a start for 'eqvae finetune'"


def _model_names(autoencoder: Autoencoder) -> tuple[str, ...]:
    """Name the weights as they were named where they came from."""
    names: tuple[str, ...] = autoencoder.names_in_file  # type: ignore[assignment]
    return names or tuple(autoencoder.model.state_dict())  # type: ignore[union-attr]


def _check_destination(destination: Path, to: Format) -> None:
    """Refuse what can be seen to be wrong before the source is loaded."""
    if os.path.lexists(destination):
        raise UserError(f"DESTINATION '{destination}' exists", "Choose another name, or remove it")
    if to in FILE_FORMATS:
        suffixes = FILE_FORMATS[to].suffixes
        if destination.suffix not in suffixes:
            raise UserError(
                f"DESTINATION '{destination}' is to be a file for --to {to}",
                f"Let its name end in {' or '.join(suffixes)}",
            )
    elif destination.suffix in _FILE_SUFFIXES:
        raise UserError(f"DESTINATION '{destination}' is to be a folder", f"Leave out '{destination.suffix}'")
    check_writable(destination.absolute().parent, "DESTINATION's folder")


def _check_class(source: str, class_name: str, to: Format) -> None:
    if to in FILE_FORMATS:
        check_class(source, class_name, to)
    if to == "taesd" and class_name not in _TINY_CLASSES:
        raise UserError(
            f"'{source}' is of the class {class_name}, which TAESD's format can't express",
            f"--to taesd takes {_TINY_CLASSES[0]}, --to diffusers takes all",
        )


def _read_note(source: str) -> dict[str, Any]:
    """What `_write_file` or `_write_pair` left beside weights; empty for everything else."""
    path = expanded(source)
    if source.removeprefix(UNTRAINED) in PRESETS or not path.exists() or (path / CONFIG).exists():
        return {}
    if (pair := find_pair(path)) is not None:
        return read_pair_note(pair[0])
    return read_note(path) if path.is_file() and path.suffix in _FILE_SUFFIXES else {}


def _read_card(source: str) -> dict[str, Any] | None:
    """Read `eqvae.json` beside the weights that `load_autoencoder` finds."""
    if source.startswith(UNTRAINED):
        return None
    path = PRESETS[source].packaged if source in PRESETS else expanded(source)
    if path is not None and path.is_file() and path.with_name(CONFIG).is_file():
        path = path.parent
    folders = () if path is None else (path / AUTOENCODER, path / "vae", path)
    folder = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    return read_json(folder / MODEL_CARD) if folder is not None and (folder / MODEL_CARD).is_file() else None


def _write_diffusers(
    autoencoder: Autoencoder, destination: Path, card: dict[str, Any] | None, *, knows_scaling: bool
) -> tuple[Sequence[str], list[str]]:
    def write(folder: Path) -> None:
        autoencoder.save(folder)
        if card is not None:
            write_json(folder / MODEL_CARD, card)

    replace_folder(destination, write)
    model: Any = autoencoder.model
    own = type(model).__module__.startswith("eqvae.")
    module = type(model).__module__ if own else "diffusers"
    advice = [f"load it with {module}.{type(model).__name__}.from_pretrained"]
    if not knows_scaling and model.config.get("scaling_factor") is not None:
        said = "1, since tokens need none" if type(model).__name__ == "VQModel" else "Stable Diffusion's"
        advice.append(
            f"its source has no scaling factor: scaling_factor {model.config['scaling_factor']:g} in {CONFIG} is {said}"
        )
    if model.config.get("padding_mode") == "reflect":
        advice.append("its convolutions pad by reflection: call eqvae.set_padding_mode(model, 'reflect') there")
    return list(model.state_dict()), advice + pipeline_advice(model.config)


def _write_file(
    autoencoder: Autoencoder,
    destination: Path,
    to: Format,
    card: dict[str, Any] | None,
    source: str,
    *,
    knows_scaling: bool,
) -> tuple[Sequence[str], list[str]]:
    model: Any = autoencoder.model
    config, described, known = model.config, describe(model, source, to), FILE_FORMATS[to]
    kept = {name: value for name, value in factors_of(config).items() if knows_scaling or name == "padding_mode"}
    note = described | kept if kept else {}
    if card is not None:
        note["card"] = card
    said = {NOTE: json.dumps(note)} if note else {}
    weights = diffusers_to_ldm(model.state_dict(), len(config["block_out_channels"]))
    state = {known.prefix + name: tensor for name, tensor in weights.items()}
    if destination.suffix == ".safetensors":
        header = said | (modelspec(destination.stem, model) if to in ("stability", "comfyui") else {})
        write_tensors(destination, state, header or None)
    else:
        content: dict[str, Any] = {str(known.container): state, **said}
        write_atomically(destination, lambda part: torch.save(content, part))
    advice = loading_advice(to, described, destination.suffix, quant_convs=has_quant_convs(config))
    if to == "comfyui":
        return list(weights), [*advice, comfyui_advice()]
    return list(weights), advice + _factors_advice(kept, to)


def _write_pair(
    autoencoder: Autoencoder, destination: Path, card: dict[str, Any] | None, source: str
) -> tuple[Sequence[str], list[str]]:
    model: Any = autoencoder.model
    encoder, decoder = diffusers_to_pair(model.state_dict())
    _check_tiny_architecture(model.config, pair_to_diffusers(encoder, decoder), source)
    stem = _pair_name(autoencoder.latent_channels, source, str((card or {}).get("base", "")))
    note = factors_of(model.config) | {PAIR: pair_identity(encoder)} | ({} if card is None else {"card": card})

    def write(folder: Path) -> None:
        for part, state in (("encoder", encoder), ("decoder", decoder)):
            torch.save(state, folder / f"{stem}_{part}.pth")
        write_json(folder / CONVERSION, note)

    replace_folder(destination, write)
    names = [*(f"encoder.{name}" for name in encoder), *(f"decoder.{name}" for name in decoder)]
    advice = [
        f"madebyollin's TAESD({stem}_encoder.pth, {stem}_decoder.pth, latent_channels={autoencoder.latent_channels}); "
        "its pictures are in [0, 1]",
        f"ComfyUI finds a pair in models/vae_approx by the name of its base's: {stem}, if that is its base",
    ]
    return names, advice + _factors_advice(note, "taesd")


def _pair_name(num_channels: int, *sources: str) -> str:
    """Name a pair after its base where that is told, else after the first model that had as many channels."""
    told = (name for source in sources for name in _PAIR_NAMES if name in PurePath(source).name.lower())
    return next(told, {4: "taesd", 16: "taesd3", 32: "taef2"}.get(num_channels, "tiny"))


def _check_tiny_architecture(config: Mapping[str, Any], read_back: Published, source: str) -> None:
    """Refuse what the pair's names and shapes don't tell."""
    from eqvae.autoencoders.families import find_family  # diffusers takes seconds to import

    with torch.device("meta"):
        built: Any = find_family(read_back.class_name, source).build(read_back.class_name, read_back.config, name="")
    for field in _OF_ARCHITECTURE:
        own, usual = (
            tuple(each) if isinstance(each, list) else each for each in (config[field], built.model.config[field])
        )
        if own != usual:
            raise UserError(
                f"'{source}' can't be expressed in TAESD's format: its {field} is {own} instead of {usual}",
                "Use its diffusers form (--to diffusers)",
            )


def _factors_advice(kept: Mapping[str, Any], to: Format) -> list[str]:
    """Say what a user of a file must set, which the file can't say to the format's code."""
    no_setting = "latent-diffusion has no setting for it"
    reflects = kept.get("padding_mode") == "reflect"
    padding = ["its convolutions pad by reflection: call eqvae.set_padding_mode(model, 'reflect') there"] * reflects
    if to == "va-vae":
        return [*padding, "LightningDiT measures its own latents_stats.pt"]
    where = "in the place of 0.2325 in MAR's code" if to == "mar" else "in the diffusion model's config"
    advice = padding
    if (factor := kept.get("scaling_factor")) is not None:
        advice.append(f"set scale_factor: {factor!r} {where}")
    if shift := kept.get("shift_factor"):
        advice.append(f"subtract {shift!r} from latents before scale_factor, and add it before decoding: {no_setting}")
    mean, std = kept.get("latents_mean"), kept.get("latents_std")
    if mean is not None and std is not None:
        advice.append(f"normalize channels by mean {list(mean)} and deviation {list(std)}: {no_setting}")
    return advice


@torch.no_grad()
def _largest_difference(one: Autoencoder, other: Autoencoder, *, folded: bool) -> float:
    """Encode and decode the same noise; where factors were folded, latents are compared as a generator sees them."""
    model: Any = one.model
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, model.config.get("in_channels", 3), 2 * one.stride, 3 * one.stride, generator=generator) * 2 - 1
    latents = [each.encode(x).mean for each in (one, other)]
    images = [each.decode(z) for each, z in zip((one, other), latents, strict=True)]
    if folded:
        latents = [configured(each).normalize(z) for each, z in zip((one, other), latents, strict=True)]
    return max(float((a - b).abs().max()) for a, b in (latents, images))
