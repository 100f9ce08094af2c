"""Published layouts: names of the weights, and the architecture that their shapes imply.

- LDM's (CompVis/latent-diffusion) and, with a codebook, VQ-GAN's (taming-transformers) and LlamaGen's variant of it. A
  `GumbelVQ` of taming has other layers and is refused. diffusers' own converter (`convert_ldm_vae_checkpoint`) leaves
  the attention blocks of a resolution under their old names and silently drops what it does not know; here one function
  from the new to the old names serves both directions.
- The pairs of files of TAESD and its relatives.
- Attention in old Stable Diffusion folders.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from eqvae.artifacts.weights import read_named
from eqvae.errors import UserError

LDM_ANCHORS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
"""Names that every autoencoder of LDM, taming-transformers and LlamaGen has."""

_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION_PATTERN = re.compile(rf"(attn_1|attn\.\d+)\.({'|'.join(map(re.escape, _ATTENTION))})\.")

_CODEBOOK = "quantize.embedding.weight"
_LLAMAGEN_BLOCKS = re.compile(r"(encoder|decoder)\.conv_blocks\.(\d+)\.")
_LLAMAGEN_PARTS = {
    ".res.": ".block.",
    ".mid.0.": ".mid.block_1.",
    ".mid.1.": ".mid.attn_1.",
    ".mid.2.": ".mid.block_2.",
}
_LLAMAGEN_USAGE = "quantize.codebook_used"
"""A buffer of LlamaGen's training: the latest tokens, for its usage figure."""

_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_PATTERN = re.compile(rf"(attentions\.\d+)\.({'|'.join(_LEGACY_ATTENTION)})\.")

_ENCODER_SUFFIXES = ("_encoder.pth", "_encoder.safetensors")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a published file holds, as diffusers describes it."""

    class_name: str
    config: dict[str, Any]
    state: dict[str, Tensor]


def block_types(attends: Sequence[bool], decoder_attends: Sequence[bool] | None = None) -> dict[str, Any]:
    """Say in a config which resolutions attend, the finest first; the decoder's are the encoder's unless given."""
    up = attends if decoder_attends is None else decoder_attends
    return {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if yes else "DownEncoderBlock2D" for yes in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if yes else "UpDecoderBlock2D" for yes in reversed(up)),
    }


def is_ldm(names: Iterable[str]) -> bool:
    """Tell CompVis' names from diffusers', which begin alike."""
    return any(re.match(r"(encoder\.down\.\d+\.|encoder\.conv_blocks\.\d+\.)", name) for name in names)


def read_ldm(weights: Mapping[str, Tensor]) -> Published:
    """Read an autoencoder of LDM, taming-transformers, MAR or LlamaGen, whose names `is_ldm` knows.

    The weights keep CompVis' names, see `ldm_to_diffusers`.
    """
    state = dict(weights)
    if _CODEBOOK in state and any(_LLAMAGEN_BLOCKS.match(key) for key in state):
        state = llamagen_to_taming(state)
    config = _infer_config(state)
    last = state.get("encoder.conv_out.weight")
    # A posterior needs twice as many channels at the encoder's end as the decoder takes.
    if _CODEBOOK not in state or last is None or last.shape[0] != state["decoder.conv_in.weight"].shape[1]:
        return Published(class_name="AutoencoderKL", config=config, state=state)
    # VQModel always has both, and strict loading will name what is missing.
    for name in ("use_quant_conv", "use_post_quant_conv"):
        del config[name]
    num_codes, width = state[_CODEBOOK].shape
    config |= {"num_vq_embeddings": num_codes, "vq_embed_dim": width, "scaling_factor": 1.0}
    return Published(class_name="VQModel", config=config, state=state)


def _infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the architecture off names and shapes, encoder and decoder apart: MAR's attends in the encoder alone."""
    levels = range(_count(state, r"encoder\.down\.(\d+)\."))
    attends, decoder_attends = (
        [any(key.startswith(f"{part}.{level}.attn.") for key in state) for level in levels]
        for part in ("encoder.down", "decoder.up")
    )
    return {
        "block_out_channels": [_num_outputs(state, f"encoder.down.{level}.block.0.conv1.weight") for level in levels],
        **block_types(attends, decoder_attends),
        "layers_per_block": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        **_image_channels(state, "encoder.conv_in.weight", "decoder.conv_out.weight"),
        "use_quant_conv": any(key.startswith("quant_conv.") for key in state),
        "use_post_quant_conv": any(key.startswith("post_quant_conv.") for key in state),
        "mid_block_add_attention": any(key.startswith("encoder.mid.attn_1.") for key in state),
        "scaling_factor": 0.18215,
    }


def _image_channels(state: Mapping[str, Tensor], first: str, last: str) -> dict[str, int]:
    """Read off the first and the last convolution how many channels images have; strict loading names what is wrong."""
    shapes = [state[name].shape for name in (first, last) if name in state and state[name].ndim == 4]
    if len(shapes) < 2 or shapes[0][1] != shapes[1][0]:
        return {}
    return {"in_channels": shapes[0][1], "out_channels": shapes[0][1]}


def _count(state: Iterable[str], pattern: str) -> int:
    return 1 + max(int(found[1]) for key in state if (found := re.match(pattern, key)))


def _num_outputs(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].shape[0] if key in state else 32  # strict loading will name the missing key


def diffusers_to_ldm_name(name: str, num_levels: int) -> str:
    """Translate the name of one weight."""
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{num_levels - 1 - int(found[1])}", name)
    name = name.replace("down_blocks.", "down.").replace("conv_norm_out", "norm_out")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"\.resnets\.(\d+)", r".block.\1", name)
    name = re.sub(r"\.attentions\.(\d+)", r".attn.\1", name)
    return _ATTENTION_PATTERN.sub(lambda found: f"{found[1]}.{_ATTENTION[found[2]]}.", name)


def ldm_to_diffusers(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Rename CompVis' weights; their 1x1 convolutions in attention become linear layers."""
    names = {diffusers_to_ldm_name(name, num_levels): name for name in expected}
    renamed = {names.get(key, key): tensor for key, tensor in state.items()}
    return {
        name: tensor.flatten(1) if name in expected and expected[name].ndim == 2 and tensor.ndim == 4 else tensor
        for name, tensor in renamed.items()
    }


def diffusers_to_ldm(state: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Rename the weights of diffusers' `AutoencoderKL` or `VQModel`; linear layers become 1x1 convolutions."""

    def reshape(name: str, tensor: Tensor) -> Tensor:
        is_linear = tensor.ndim == 2 and not name.startswith("quantize.")  # a codebook is a matrix in both
        return tensor[:, :, None, None] if is_linear else tensor

    return {diffusers_to_ldm_name(name, num_levels): reshape(name, tensor) for name, tensor in state.items()}


def llamagen_to_taming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of LlamaGen's tokenizer, and bring its codes to unit length.

    LlamaGen compares directions: latents and codes are normalized before the search. To codes of unit length the
    direction's nearest is the latent's own nearest, so tokens and pictures stay what they were. E(x) keeps its length
    here, however, and so do equivariance errors on it, and fine-tuning lets the codes change theirs.
    """
    num_levels = 1 + max(int(found[2]) for key in state if (found := _LLAMAGEN_BLOCKS.match(key)))

    def rename(key: str) -> str:
        found = _LLAMAGEN_BLOCKS.match(key)
        if found is not None:
            coder, index = found[1], int(found[2])  # LlamaGen counts the decoder's levels from the coarsest
            level = f"down.{index}" if coder == "encoder" else f"up.{num_levels - 1 - index}"
            key = f"{coder}.{level}.{key[found.end() :]}"
        for theirs, ours in _LLAMAGEN_PARTS.items():
            key = key.replace(theirs, ours)
        return key

    renamed = {rename(key): tensor for key, tensor in state.items() if key != _LLAMAGEN_USAGE}
    return renamed | {_CODEBOOK: F.normalize(renamed[_CODEBOOK].float(), dim=1)}


def find_pair(path: Path) -> tuple[Path, Path] | None:
    """Look for a TAESD model in its author's format: `X_encoder.pth` with `X_decoder.pth` (or `.safetensors`)."""
    if path.is_dir():
        encoders = sorted(file for file in path.iterdir() if file.name.endswith(_ENCODER_SUFFIXES))
    else:
        encoders = [path] if path.name.endswith(_ENCODER_SUFFIXES) else []
    if not encoders:
        return None
    if len(encoders) > 1:
        names = ", ".join(file.name for file in encoders)
        raise UserError(f"'{path}' holds several tiny autoencoders ({names})", "Give the path of one encoder file")
    encoder = encoders[0]
    decoder = encoder.with_name(encoder.name.replace("_encoder.", "_decoder."))
    if not decoder.is_file():
        if not path.is_dir() and not _is_half(encoder):
            return None  # a whole autoencoder of such a name
        raise UserError(f"'{decoder}' does not exist", f"It belongs to '{encoder.name}': fetch both files")
    return encoder, decoder


def _is_half(path: Path) -> bool:
    """Whether a file's names are those of a pair's, numbers in their first part; a damaged one may be anything."""
    try:
        return all(name.partition(".")[0].isdigit() for name in read_named(path).getters)
    except UserError:
        return True


def pair_to_diffusers(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> Published:
    """Rename the weights of a pair and read its variant and its latent channels off their shapes.

    Both files number the layers of one `nn.Sequential`. The decoder's layer 0 is the clamp `3 tanh(x / 3)`, which
    diffusers applies as a function, so that its numbers are lower by one.
    """
    state = {f"encoder.layers.{key}": tensor for key, tensor in encoder.items()}
    for key, tensor in decoder.items():
        number, _, rest = key.partition(".")
        shifted = f"{int(number) - 1}.{rest}" if number.isdecimal() else key
        state[f"decoder.layers.{shifted}"] = tensor
    pooled = any(".pool." in key for key in state)
    first = decoder.get("1.weight")
    config: dict[str, Any] = {"latent_channels": first.shape[1]} if first is not None and first.ndim == 4 else {}
    last = max((int(key.partition(".")[0]) for key in decoder if key.partition(".")[0].isdecimal()), default=1) - 1
    config |= _image_channels(state, "encoder.layers.0.weight", f"decoder.layers.{last}.weight")
    return Published(class_name="PooledAutoencoderTiny" if pooled else "AutoencoderTiny", config=config, state=state)


def diffusers_to_pair(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename the weights of diffusers' tiny autoencoders: the way back of `pair_to_diffusers`."""
    encoder: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, number, rest = name.split(".", 3)
        if part == "encoder":
            encoder[f"{number}.{rest}"] = tensor
        else:
            decoder[f"{int(number) + 1}.{rest}"] = tensor
    return encoder, decoder


def rename_legacy_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the attention weights of old Stable Diffusion folders their present names, as diffusers does."""
    return {
        _LEGACY_PATTERN.sub(lambda found: f"{found[1]}.{_LEGACY_ATTENTION[found[2]]}.", key): tensor
        for key, tensor in state.items()
    }
