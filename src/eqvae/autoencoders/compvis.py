"""What a file under CompVis' names is to whom, and what their codes can't run.

ldm, taming    CompVis' own, also inside Lightning's checkpoint (`.ckpt`, under `state_dict`)
stability      one file of a whole diffusion model has these names behind `first_stage_model.`
comfyui        bare names again; it builds what it knows from two names and ignores the rest
mar, va-vae    LTH14/mar (under `model`; its decoder does not attend), hustvl/LightningDiT (under `state_dict`)
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eqvae.errors import UserError

_NUM_GROUPS = 32
_RESOLUTION_PX = 256
"""`resolution` of every published ddconfig; with `attn_resolutions` it only says which levels attend."""

_ATTENDING_PX = 16
"""Where MAR's and VA-VAE's code attends, written into it."""

_COMFYUI_CHANNELS = ((128, 256, 512, 512), (128, 256, 512))
_BLOCKS = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A kind of file under CompVis' names."""

    title: str
    """Whose, as messages say it."""

    class_names: tuple[str, ...]
    """What it may hold, by diffusers' classes."""

    suffixes: tuple[str, ...]
    """Of its name; the first is proposed."""

    container: str | None = "state_dict"
    """Where a pickle has the weights; None where there are no pickles."""

    prefix: str = ""
    """Before each name."""


FILE_FORMATS: dict[str, FileFormat] = {
    "ldm": FileFormat(
        title="CompVis'", class_names=("AutoencoderKL", "VQModel"), suffixes=(".safetensors", ".ckpt")
    ),
    "taming": FileFormat(title="taming-transformers'", class_names=("VQModel",), suffixes=(".ckpt",)),
    "stability": FileFormat(
        title="Stability's", class_names=("AutoencoderKL",), suffixes=(".safetensors", ".ckpt"),
        prefix="first_stage_model.",
    ),
    "comfyui": FileFormat(
        title="ComfyUI's", class_names=("AutoencoderKL",), suffixes=(".safetensors",), container=None
    ),
    "mar": FileFormat(title="MAR's", class_names=("AutoencoderKL",), suffixes=(".ckpt",), container="model"),
    "va-vae": FileFormat(title="VA-VAE's", class_names=("AutoencoderKL",), suffixes=(".pt", ".ckpt")),
}  # fmt: skip
"""By the name that `--to` has for them."""


def check_class(source: str, class_name: str, to: str) -> None:
    """Refuse a class that a format can't hold."""
    known = FILE_FORMATS[to]
    if class_name not in known.class_names:
        raise UserError(
            f"'{source}' is of the class {class_name}, which {known.title} format can't express",
            f"--to {to} takes {' and '.join(known.class_names)}, --to diffusers takes all",
        )


def describe(model: Any, source: str, to: str = "ldm") -> dict[str, Any]:
    """Say how the format's own code builds a model; refuse one that it would build otherwise."""
    class_name, config = type(model).__name__, model.config
    check_class(source, class_name, to)
    for obstacle in _obstacles(config, to):
        raise UserError(
            f"'{source}' can't be expressed in {FILE_FORMATS[to].title} format: {obstacle}",
            "Use its diffusers form (--to diffusers)",
        )
    is_discrete = class_name == "VQModel"
    channels = config["block_out_channels"]
    multipliers = [number // channels[0] for number in channels]
    embed_dim = (config["vq_embed_dim"] or config["latent_channels"]) if is_discrete else config["latent_channels"]
    if to in ("mar", "va-vae"):
        target = "models.vae.AutoencoderKL" if to == "mar" else "tokenizer.autoencoder.AutoencoderKL"
        return {"target": target, "embed_dim": embed_dim, "ch_mult": multipliers}
    ddconfig = {
        "double_z": not is_discrete,
        "z_channels": config["latent_channels"],
        "resolution": _RESOLUTION_PX,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": multipliers,
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [_RESOLUTION_PX >> level for level, attend in enumerate(_attends(config)) if attend],
        "dropout": 0.0,
    }
    if not config.get("mid_block_add_attention", True):
        ddconfig["attn_type"] = "none"
    target = f"ldm.models.autoencoder.{class_name}" if to != "taming" else "taming.models.vqgan.VQModel"
    if not has_quant_convs(config):
        target = "ldm.modules.diffusionmodules.model.Encoder and Decoder"
    described = {"target": target, "embed_dim": embed_dim, "ddconfig": ddconfig}
    return described | ({"n_embed": config["num_vq_embeddings"]} if is_discrete else {})


def has_quant_convs(config: Mapping[str, Any]) -> bool:
    """Look for layers that an `AutoencoderKL` may lack and a `VQModel` always has."""
    return all(config.get(name, True) for name in ("use_quant_conv", "use_post_quant_conv"))


def loading_advice(to: str, described: Mapping[str, Any], suffix: str, *, quant_convs: bool) -> list[str]:
    """Say what a user of a file must know to load it, which the file can't say to the format's code."""
    known, building = FILE_FORMATS[to], f"for {described['target']}"
    settings = json.dumps({name: value for name, value in described.items() if name != "target"})
    where = "" if suffix == ".safetensors" else f", under '{known.container}'"
    if to == "comfyui":
        return ["put it into models/vae, for the node Load VAE"]
    if to in ("mar", "va-vae"):
        return [f"{building}, which reads '{known.container}' of it: {settings}"]
    if known.prefix:
        naming = f"CompVis' names behind '{known.prefix}'{where}, as in a diffusion model's single file"
    elif quant_convs:
        naming = (
            f"CompVis' names without prefix{where}: loads strictly where lossconfig is torch.nn.Identity; inside a "
            "diffusion model's checkpoint they begin with 'first_stage_model.'"
        )
    else:
        naming = (
            f"CompVis' names without prefix{where} and without quant_conv, as in SD3's and Flux' own files; "
            "CompVis' AutoencoderKL has these layers and does not load it strictly"
        )
    return [naming, f"{building}: {settings}"]


def modelspec(title: str, model: Any) -> dict[str, str]:
    """Write the header's entries by which interfaces tell files apart (Stability's ModelSpec 1.0.1)."""
    config = model.config
    stride = 2 ** (len(config["block_out_channels"]) - 1)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"autoencoder-kl-f{stride}d{config['latent_channels']}/vae",
        "modelspec.implementation": "https://github.com/CompVis/latent-diffusion",
        "modelspec.title": title,
    }


def _attends(config: Mapping[str, Any]) -> list[bool]:
    return [kind == "AttnDownEncoderBlock2D" for kind in config["down_block_types"]]


def _obstacles(config: Mapping[str, Any], to: str) -> Iterator[str]:
    """Name what a format's code has no setting for, though names and shapes may fit: its outputs would be others."""
    attends, channels = _attends(config), config["block_out_channels"]
    up_attends = [kind == "AttnUpDecoderBlock2D" for kind in reversed(config["up_block_types"])]
    others = {*config["down_block_types"], *config["up_block_types"]} - _BLOCKS
    attends_in_middle = config.get("mid_block_add_attention", True)
    obstacles = [
        (bool(others), f"it has blocks of the kind {', '.join(sorted(others))}"),
        (
            config["norm_num_groups"] != _NUM_GROUPS,
            f"its norms have {config['norm_num_groups']} groups instead of {_NUM_GROUPS}",
        ),
        (config["act_fn"] not in ("silu", "swish"), f"its activation is {config['act_fn']} instead of silu"),
        (config.get("norm_type", "group") != "group", f"its norms are {config.get('norm_type')}"),
        (to != "mar" and attends != up_attends, "its encoder and decoder attend at different resolutions"),
        (any(attends) and not attends_in_middle, "it attends, but not in the middle"),
        (any(number % channels[0] for number in channels), f"{channels} are no multiples of the first"),
    ]
    if to in ("comfyui", "mar", "va-vae"):
        obstacles += [
            (config["in_channels"] != 3 or config["out_channels"] != 3, "its pictures are not of 3 channels"),
            (config["layers_per_block"] != 2, f"it has {config['layers_per_block']} blocks at a resolution, not 2"),
            (channels[0] != 128, f"its finest resolution has {channels[0]} channels, not 128"),
        ]
    if to in ("comfyui", "mar", "va-vae", "taming"):
        obstacles.append((not attends_in_middle, "it does not attend in the middle"))
    if to == "comfyui":
        obstacles.append((config.get("padding_mode") == "reflect", "its convolutions pad by reflection"))
        obstacles.append((any(attends), "it attends at a resolution, where that attends in the middle alone"))
        obstacles.append((tuple(channels) not in _COMFYUI_CHANNELS, f"it has {channels} channels"))
    if to in ("mar", "va-vae"):
        at = [_RESOLUTION_PX >> level == _ATTENDING_PX for level in range(len(channels))]
        obstacles += [
            (not has_quant_convs(config), "it has no quant_conv"),
            (attends != at, f"its encoder does not attend at {_ATTENDING_PX} px of {_RESOLUTION_PX}"),
            (to == "mar" and any(up_attends), "its decoder attends at a resolution"),
        ]
    return (what for is_there, what in obstacles if is_there)
