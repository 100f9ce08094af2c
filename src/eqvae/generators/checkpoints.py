"""Published and own weight files of generators: read without running anything in them, and loaded strictly."""

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eqvae.artifacts import load_strictly, read_tensors
from eqvae.errors import UserError
from eqvae.generators.maskgit_transformer import MaskTransformer, MaskTransformerConfig, published_weights
from eqvae.generators.transformer import Transformer, TransformerConfig

Backbone = Transformer | MaskTransformer
"""The network of a generator of latents, or of tokens."""

BackboneConfig = TransformerConfig | MaskTransformerConfig

_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before names."""


class _Inert:
    """Stands for the command line (argparse's Namespace) that training codes save beside weights; it does nothing."""


_INERT_GLOBALS: list[Any] = [(_Inert, "argparse.Namespace")]


def read_generator_weights(path: Path, which: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Read weights under the published names: ours, or an official checkpoint of DiT, SiT, REPA or MaskGIT."""
    state = read_tensors(path)[0] if path.suffix == ".safetensors" else _read_pickle(path, which)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        renamed[name] = tensor.float()
    return renamed


def _read_pickle(path: Path, which: str) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_INERT_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "Check the path") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"'{path}' is truncated or holds more than weights, and was refused: nothing in it was run",
            "Use a .safetensors file of the same weights",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError):
        raise UserError(f"'{path}' is truncated or no weight file", "Fetch it again") from None
    if isinstance(content, Mapping) and "model_state_dict" in content:
        return published_weights(content)
    if isinstance(content, Mapping) and isinstance(content.get(which), Mapping):
        content = content[which]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"'{path}' holds no named weights", "Give a state dict or a training checkpoint")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def join_legacy_blocks(state: Mapping[str, Tensor], encoder_depth: int = 8) -> dict[str, Tensor]:
    """Rename the blocks of REPA's early checkpoints, which count those after the projector from 0 again."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("decoder_blocks."):
            _, index, rest = name.split(".", 2)
            name = f"blocks.{int(index) + encoder_depth}.{rest}"
        renamed[name] = tensor
    return renamed


def fit_config(config: TransformerConfig, state: Mapping[str, Tensor]) -> TransformerConfig:
    """Take from weights what a preset leaves open: output channels, normalized queries and keys, projector."""
    linear = state.get("final_layer.linear.bias")
    projector = {name: state[name] for name in ("projectors.0.2.weight", "projectors.0.4.bias") if name in state}
    return replace(
        config,
        out_channels=config.out_channels if linear is None else len(linear) // config.patch_size**2,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        teacher_channels=len(projector["projectors.0.4.bias"]) if len(projector) == 2 else None,
        projector_width=len(projector["projectors.0.2.weight"]) if len(projector) == 2 else config.projector_width,
    )


def build_backbone(config: BackboneConfig, *, generator: torch.Generator | None = None) -> Backbone:
    """Build the network that a config describes, with first weights."""
    if isinstance(config, MaskTransformerConfig):
        return MaskTransformer(config, generator=generator)
    return Transformer(config, generator=generator)


def load_generator(config: BackboneConfig, state: Mapping[str, Tensor], *, source: str) -> Backbone:
    """Build a transformer with given weights; every name and shape has to fit."""
    with torch.device("meta"):
        transformer = build_backbone(config)
    load_strictly(
        transformer,
        state,
        source=source,
        model_name="the generator",
        mend="Are recipe, latents and number of classes those of the weights?",
    )
    if isinstance(transformer, Transformer):
        transformer.pos_embed.requires_grad_(False)
    return transformer.eval()
