"""Weight files: read without running anything that is in them."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqvae.artifacts import read_json, read_tensors
from eqvae.errors import UserError

_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_PATTERN = re.compile(rf"(attentions\.\d+)\.({'|'.join(_LEGACY_ATTENTION)})\.")
_REFUSED_PATTERN = re.compile(r"((?:GLOBAL|class|function) \S+)")
"""What torch's restricted unpickler names when a pickle asks for more than tensors and containers."""

_WRAPPERS = ("state_dict", "model")
"""Entries under which Lightning's checkpoints and LlamaGen's keep the weights."""


class _Inert:
    """Stands for Lightning's ModelCheckpoint, a key of the callbacks' table in most LDM files; it does nothing."""


_INERT_GLOBALS: list[Any] = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weight file; one that is missing, truncated or without weights, or that holds code, is a `UserError`."""
    if path.suffix == ".json":
        state = _read_shards(path)
    elif path.suffix == ".safetensors":
        state, _ = read_tensors(path)
    else:
        state = _read_pickle(path)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"'{index}' names no shards", "Fetch it again")
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        state |= read_weights(index.with_name(Path(name).name))  # a shard lies beside its index and nowhere else
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_INERT_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "Check the path") from None
    except pickle.UnpicklingError as error:
        if (refused := _REFUSED_PATTERN.search(str(error))) is not None:
            raise UserError(
                f"'{path}' holds code ({refused[1]}) and was refused: nothing in it was run",
                "Use a .safetensors file of the same weights",
            ) from None
        raise _unreadable(path) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError):
        raise _unreadable(path) from None
    while isinstance(content, Mapping) and (
        name := next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
    ):
        content = content[name]
    if not isinstance(content, Mapping):
        raise UserError(f"'{path}' holds no named weights but {type(content).__name__}", "Give a state dict")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"'{path}' holds no named weights", "Give a state dict")
    return state


def _unreadable(path: Path) -> UserError:
    return UserError(f"'{path}' is truncated or no weight file", "Fetch or write it again")


def rename_legacy_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the attention weights of old Stable Diffusion folders their present names, as diffusers does."""
    return {
        _LEGACY_PATTERN.sub(lambda found: f"{found[1]}.{_LEGACY_ATTENTION[found[2]]}.", key): tensor
        for key, tensor in state.items()
    }
