"""Checkpoints: every tensor and number that a resume needs, in one safetensors file with a digest; two are kept."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from eqvae.artifacts.files import read_tensors, write_atomically, write_tensors
from eqvae.artifacts.names import CHECKPOINT, CHECKPOINT_BEFORE, MILESTONES, milestone_name
from eqvae.errors import UserError
from eqvae.training.sharding import like


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory."""

    tensors: dict[str, Tensor]

    numbers: dict[str, Any]

    damage: str | None
    """What is wrong with the latest one, where this is the one before."""


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can be resumed."""
    return any((folder / name).exists() for name in (CHECKPOINT, CHECKPOINT_BEFORE))


def saved_step(folder: Path) -> int | None:
    """Step of the latest checkpoint, by its header alone; None where there is none, or it is damaged."""
    try:
        with safe_open(folder / CHECKPOINT, "pt") as file:
            return int(json.loads(file.metadata()["numbers"])["step"])
    except Exception:  # a damaged header raises almost anything; whoever reads all of it says what is wrong
        return None


def check_kept(keep_every: int, keep_last: int) -> None:
    """Refuse to count milestones that are not kept."""
    if keep_last and not keep_every:
        raise UserError(f"--keep-last {keep_last} has no place: no checkpoints are kept", "Give --keep-every, too")


def check_not_beyond(folder: Path, *, max_steps: int, polish_steps: int | None = None) -> None:
    """Refuse a folder whose latest checkpoint is of a later step; to be asked before `config.json` is written."""
    step = saved_step(folder) or 0
    if step > max_steps + (polish_steps or 0):
        wanted = f"--max-steps {max_steps}"
        wanted += "" if polish_steps is None else f" and --polish-steps {polish_steps}"
        raise UserError(f"'{folder}' is at step {step}, beyond {wanted}", "Give as many or more, or another --out")


def read_latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the latest checkpoint that is whole; None where there is none at all."""
    damages: list[str] = []
    for name in (CHECKPOINT, CHECKPOINT_BEFORE):
        path = folder / name
        if not path.exists():
            damages.append(f"'{path}' is missing")
            continue
        try:
            tensors, numbers = read_checkpoint(path)
        except UserError as error:
            damages.append(error.what)
            continue
        return Checkpoint(tensors=tensors, numbers=numbers, damage=damages[0] if damages else None)
    if has_checkpoint(folder):
        raise UserError(" and ".join(damages), f"Remove the damaged file to begin '{folder}' again from its first step")
    return None


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], *, rotate: bool) -> None:
    """Write a checkpoint: an interrupted write leaves the former one, which with `rotate` is kept in any case."""
    former = folder / CHECKPOINT_BEFORE if rotate else None
    write_tensors(folder / CHECKPOINT, tensors, {"numbers": json.dumps(dict(numbers))}, digest=True, former=former)


def keep_milestone(folder: Path, step: int, *, every: int, num_kept: int) -> None:
    """Keep the latest checkpoint, which is of this step, and of those before at most `num_kept` with it; 0: all."""

    def link(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(folder / CHECKPOINT, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(folder / CHECKPOINT, temporary)

    path = folder / MILESTONES / milestone_name(step)
    if not path.exists():
        write_atomically(path, link)
    for former in range(step - num_kept * every, 0, -every) if num_kept else ():
        (folder / MILESTONES / milestone_name(former)).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one checkpoint."""
    tensors, metadata = read_tensors(path)
    if "numbers" not in metadata:
        raise UserError(f"'{path}' is no checkpoint of eqvae", "Remove it to start again")
    return tensors, json.loads(metadata["numbers"])


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
                own = torch.empty_like(parameters[int(index)], dtype=tensor.dtype)
                tensor = own.copy_(like(tensor, own))
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def sub_state(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take one module's tensors out of a checkpoint."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}
