"""Checkpoints: every tensor and number that a resume needs, in one safetensors file; nothing pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from eqvae.artifacts import read_tensors, write_tensors
from eqvae.errors import UserError


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """Flatten an optimizer's state."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{key}": value
        for index, entries in state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name[len(prefix) + 1 :].split(".", 1)
            if tensor.shape == parameters[int(index)].shape:
                # Fused optimizers walk through memory: moments need their parameter's layout, here channels-last.
                tensor = torch.empty_like(parameters[int(index)], dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: an interrupted write leaves the former one."""
    write_tensors(path, tensors, {"numbers": json.dumps(dict(numbers))})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint."""
    tensors, metadata = read_tensors(path)
    if "numbers" not in metadata:
        raise UserError(f"'{path}' is no checkpoint of eqvae", "Remove it to start again")
    return tensors, json.loads(metadata["numbers"])


def sub_state(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take one module's tensors out of a checkpoint."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
