"""One autoencoder in another format: diffusers' folder, or one file under CompVis' names (LDM, taming-transformers).

An LDM file has no place for what a diffusers config says besides the architecture. It goes into the file's header,
where CompVis' code does not look and the way back does.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from eqvae.artifacts.files import check_writable, read_json, replace_folder, write_json, write_tensors
from eqvae.artifacts.names import AUTOENCODER, CONFIG, MODEL_CARD
from eqvae.artifacts.records import Converted
from eqvae.autoencoders.layouts import diffusers_to_ldm
from eqvae.autoencoders.loading import load_autoencoder, split_weights
from eqvae.autoencoders.presets import PRESETS, UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError

Format = Literal["diffusers", "ldm"]

_LDM_SUFFIX = ".safetensors"
_FILE_SUFFIXES = (_LDM_SUFFIX, ".ckpt", ".pth", ".pt", ".bin")
_LDM_CLASSES = ("AutoencoderKL", "VQModel")
_NOTE = "eqvae"
"""The header's only entry of metadata: safetensors writes several in no fixed order."""

_BESIDE_ARCHITECTURE = (
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast"
)  # fmt: skip
"""Fields of a diffusers config that an LDM file's names and shapes don't show."""

_LDM_NUM_GROUPS = 32
_LDM_RESOLUTION_PX = 256
"""`resolution` of every published ddconfig; with `attn_resolutions` it only says which levels attend."""


def convert_autoencoder(source: str, destination: Path, to: Format) -> Converted:
    """Write an autoencoder in another format; weights are fp32, and their values stay what they were, bit for bit.

    `source` is anything that `load_autoencoder` takes. `diffusers` is a folder, with `eqvae.json` where the source has
    one; `ldm` is a `.safetensors` file under the names of CompVis' own AutoencoderKL and VQModel, without prefix.
    """
    _check_destination(destination, to)
    name = source.removeprefix(UNTRAINED)
    if to == "ldm" and name in PRESETS:  # told before gigabytes are fetched
        _check_ldm_class(source, PRESETS[name].architecture.class_name)
    autoencoder = load_autoencoder(source)
    source, _ = split_weights(source)
    note = _read_note(source)
    model: Any = autoencoder.model
    kept = {field: note[field] for field in _BESIDE_ARCHITECTURE if field in note and field in model.config}
    model.register_to_config(**kept)
    card = note.get("card") or _read_card(source)
    knows_scaling = bool(note) or not _is_weight_file(source)
    if to == "diffusers":
        return _write_diffusers(autoencoder, destination, card, knows_scaling=knows_scaling)
    return _write_ldm(autoencoder, destination, card, source, knows_scaling=knows_scaling)


def describe_ldm(model: Any, source: str) -> dict[str, Any]:
    """Say how CompVis' code builds a model."""
    class_name, config = type(model).__name__, model.config
    _check_ldm_class(source, class_name)
    is_discrete = class_name == "VQModel"
    attends = [kind == "AttnDownEncoderBlock2D" for kind in config["down_block_types"]]
    _check_ldm_architecture(config, attends, source)
    channels = config["block_out_channels"]
    ddconfig = {
        "double_z": not is_discrete,
        "z_channels": config["latent_channels"],
        "resolution": _LDM_RESOLUTION_PX,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [number // channels[0] for number in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [_LDM_RESOLUTION_PX >> level for level, attend in enumerate(attends) if attend],
        "dropout": 0.0,
    }
    if not config.get("mid_block_add_attention", True):
        ddconfig["attn_type"] = "none"
    embed_dim = (config["vq_embed_dim"] or config["latent_channels"]) if is_discrete else config["latent_channels"]
    target = f"ldm.models.autoencoder.{class_name}"
    if not _has_quant_convs(config):
        target = "ldm.modules.diffusionmodules.model.Encoder and Decoder"
    described = {"target": target, "embed_dim": embed_dim, "ddconfig": ddconfig}
    return described | ({"n_embed": config["num_vq_embeddings"]} if is_discrete else {})


def _has_quant_convs(config: Mapping[str, Any]) -> bool:
    """Look for layers that an `AutoencoderKL` may lack and a `VQModel` always has."""
    return all(config.get(name, True) for name in ("use_quant_conv", "use_post_quant_conv"))


def _check_destination(destination: Path, to: Format) -> None:
    """Refuse what can be seen to be wrong before the source is loaded."""
    if os.path.lexists(destination):
        raise UserError(f"DESTINATION '{destination}' exists", "Choose another name, or remove it")
    if to == "ldm" and destination.suffix != _LDM_SUFFIX:
        raise UserError(f"DESTINATION '{destination}' is to be an LDM file", f"Let its name end in {_LDM_SUFFIX}")
    if to == "diffusers" and destination.suffix in _FILE_SUFFIXES:
        raise UserError(f"DESTINATION '{destination}' is to be a folder", f"Leave out '{destination.suffix}'")
    check_writable(destination.absolute().parent, "DESTINATION's folder")


def _check_ldm_class(source: str, class_name: str) -> None:
    if class_name not in _LDM_CLASSES:
        raise UserError(
            f"'{source}' is of the class {class_name}, which CompVis' format can't express",
            f"--to ldm takes {' and '.join(_LDM_CLASSES)}, --to diffusers takes all",
        )


def _check_ldm_architecture(config: Mapping[str, Any], attends: list[bool], source: str) -> None:
    """Refuse what CompVis' code has no setting for, though names and shapes may fit: its outputs would be others."""
    up_attends = [kind == "AttnUpDecoderBlock2D" for kind in reversed(config["up_block_types"])]
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    others = kinds - {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
    channels, num_groups = config["block_out_channels"], config["norm_num_groups"]
    obstacles = (
        (bool(others), f"it has blocks of the kind {', '.join(sorted(others))}"),
        (num_groups != _LDM_NUM_GROUPS, f"its norms have {num_groups} groups instead of {_LDM_NUM_GROUPS}"),
        (config["act_fn"] not in ("silu", "swish"), f"its activation is {config['act_fn']} instead of silu"),
        (config.get("norm_type", "group") != "group", f"its norms are {config.get('norm_type')}"),
        (attends != up_attends, "its encoder and decoder attend at different resolutions"),
        (any(attends) and not config.get("mid_block_add_attention", True), "it attends, but not in the middle"),
        (any(number % channels[0] for number in channels), f"{channels} are no multiples of the first"),
    )
    for is_there, what in obstacles:
        if is_there:
            raise UserError(
                f"'{source}' can't be expressed in CompVis' format: {what}", "Use its diffusers form (--to diffusers)"
            )


def _is_weight_file(source: str) -> bool:
    return source.removeprefix(UNTRAINED) not in PRESETS and Path(source).expanduser().is_file()


def _read_note(source: str) -> dict[str, Any]:
    """What `_write_ldm` left in a file's header; empty for everything else."""
    path = Path(source).expanduser()
    if not _is_weight_file(source) or path.suffix != _LDM_SUFFIX:
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get(_NOTE, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"The header of '{path}' is damaged ({error})", "Fetch or write it again") from None
    return note if isinstance(note, dict) else {}


def _read_card(source: str) -> dict[str, Any] | None:
    """Read `eqvae.json` beside the weights that `load_autoencoder` finds."""
    if source.startswith(UNTRAINED):
        return None
    path = PRESETS[source].packaged if source in PRESETS else Path(source).expanduser()
    folders = () if path is None else (path / AUTOENCODER, path / "vae", path)
    folder = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    return read_json(folder / MODEL_CARD) if folder is not None and (folder / MODEL_CARD).is_file() else None


def _write_diffusers(
    autoencoder: Autoencoder, destination: Path, card: dict[str, Any] | None, *, knows_scaling: bool
) -> Converted:
    def fill(folder: Path) -> None:
        autoencoder.save(folder)
        if card is not None:
            write_json(folder / MODEL_CARD, card)

    replace_folder(destination, fill)
    model: Any = autoencoder.model
    own = type(model).__module__.startswith("eqvae.")
    module = type(model).__module__ if own else "diffusers"
    advice = [f"load it with {module}.{type(model).__name__}.from_pretrained"]
    if not knows_scaling and model.config.get("scaling_factor") is not None:
        said = "1, since tokens need none" if type(model).__name__ == "VQModel" else "Stable Diffusion's"
        advice.append(
            f"its source has no scaling factor: scaling_factor {model.config['scaling_factor']:g} in {CONFIG} is {said}"
        )
    return Converted(path=destination, advice=tuple(advice))


def _write_ldm(
    autoencoder: Autoencoder, destination: Path, card: dict[str, Any] | None, source: str, *, knows_scaling: bool
) -> Converted:
    model: Any = autoencoder.model
    config, described = model.config, describe_ldm(model, source)
    kept = {field: config[field] for field in _BESIDE_ARCHITECTURE if field in config} if knows_scaling else {}
    note = described | kept if kept else {}
    if card is not None:
        note["card"] = card
    state = diffusers_to_ldm(model.state_dict(), len(config["block_out_channels"]))
    write_tensors(destination, state, {_NOTE: json.dumps(note)} if note else None)
    advice = _ldm_advice(described, kept, has_quant_convs=_has_quant_convs(config))
    return Converted(path=destination, advice=tuple(advice))


def _ldm_advice(described: Mapping[str, Any], kept: Mapping[str, Any], *, has_quant_convs: bool) -> list[str]:
    """Say what a user of the file must know and set, which the file can't say to CompVis' code."""
    no_setting = "latent-diffusion has no setting for it"
    settings = {name: value for name, value in described.items() if name != "target"}
    advice = [
        "CompVis' names without prefix: loads strictly where lossconfig is torch.nn.Identity; inside a diffusion "
        "model's checkpoint they begin with 'first_stage_model.'"
        if has_quant_convs
        else "CompVis' names without prefix and without quant_conv, as in SD3's and Flux' own files; "
        "CompVis' AutoencoderKL has these layers and does not load it strictly",
        f"for {described['target']}: {json.dumps(settings)}",
    ]
    if (factor := kept.get("scaling_factor")) is not None:
        advice.append(f"set scale_factor: {factor!r} in the diffusion model's config")
    if shift := kept.get("shift_factor"):
        advice.append(f"subtract {shift!r} from latents before scale_factor, and add it before decoding: {no_setting}")
    mean, std = kept.get("latents_mean"), kept.get("latents_std")
    if mean is not None and std is not None:
        advice.append(f"normalize channels by mean {list(mean)} and deviation {list(std)}: {no_setting}")
    return advice
