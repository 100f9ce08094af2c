"""CompVis' LDM format: names of the weights, and the architecture that their shapes imply.

diffusers' own converter (`convert_ldm_vae_checkpoint`) leaves the attention blocks of a resolution under their old
names and silently drops what it does not know. One function from the new to the old names serves both directions.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

_PREFIXES = ("first_stage_model.", "vae.", "")
_TRAINING_STATE = ("loss.", "model_ema.")
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION_PATTERN = re.compile(rf"(attn_1|attn\.\d+)\.({'|'.join(map(re.escape, _ATTENTION))})\.")


def select_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the autoencoder's weights out of a checkpoint."""
    prefix = next(prefix for prefix in _PREFIXES if not prefix or any(key.startswith(prefix) for key in state))
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return {key: tensor for key, tensor in own.items() if not key.startswith(_TRAINING_STATE)}


def is_ldm(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are an autoencoder's weights under CompVis' names."""
    return {"encoder.down.0.block.0.conv1.weight", "encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(state)


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the architecture off names and shapes."""
    num_levels = _count(state, r"encoder\.down\.(\d+)\.")
    levels = range(num_levels)
    attends = [any(key.startswith(f"encoder.down.{level}.attn.") for key in state) for level in levels]
    return {
        "block_out_channels": [_num_outputs(state, f"encoder.down.{level}.block.0.conv1.weight") for level in levels],
        "down_block_types": ["AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in reversed(attends)],
        "layers_per_block": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "use_quant_conv": any(key.startswith("quant_conv.") for key in state),
        "use_post_quant_conv": any(key.startswith("post_quant_conv.") for key in state),
        "mid_block_add_attention": any(key.startswith("encoder.mid.attn_1.") for key in state),
        "scaling_factor": 0.18215,
    }


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
