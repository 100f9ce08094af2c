"""How much memory work takes, worked out before it is done, and whether there is as much.

The work's own code runs on tensors that have sizes and no values (PyTorch's fake tensors): nothing is computed, and
what is alive on the device at the same time is counted; on a processor also what its heap keeps of what was freed. What
kernels take inside is not seen.
"""

import contextlib
import copy
import errno
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eqvae.errors import UserError
from eqvae.runtime.heap import Heap
from eqvae.runtime.journal import say

Module = TypeVar("Module", bound=nn.Module)

MARGIN = 0.15
"""By so much predictions missed what was measured, at most (docs/scale.md)."""

_KERNELS_BYTES = 50 * 2**20
"""Parts of PyTorch's libraries that come into a process's memory when the kernels of a forward pass first run; those of
a backward pass take as much again."""

FINETUNE_FLAGS = ("--gradient-accumulation-steps", "--precision bf16", "--batch-size", "--image-size")
TRAIN_FLAGS = ("--gradient-accumulation-steps", "--gradient-checkpointing", "--precision bf16", "--batch-size",
               "--shard on several devices")  # fmt: skip
SAMPLE_FLAGS = ("--batch-size", "--precision bf16")
"""What helps where a run of a command does not fit."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a run takes of its device's memory at the most."""

    phases: Mapping[str, int]
    """Bytes that tensors take in each phase, at the most."""

    unknown: tuple[str, ...] = ()
    """Phases that could not be gone through to their end."""

    process_bytes: int
    """Python and its libraries; 0 on an accelerator, where they take none of what is counted as free."""

    @property
    def peak_bytes(self) -> int:
        return self.process_bytes + max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda name: self.phases[name])

    def figures(self) -> dict[str, Any]:
        """Name the figures, for `--dry-run`."""
        phases = {f"memory_gib_{name}": (self.process_bytes + size) / 2**30 for name, size in self.phases.items()}
        known = {"memory_gib": self.peak_bytes / 2**30, **phases}
        return known | ({"memory_unknown": list(self.unknown)} if self.unknown else {})

    def check_fits(self, device: torch.device, flags: Sequence[str], *, num_processes: int = 1) -> None:
        """Refuse a run that takes more than there is; say where it is close."""
        sharing = num_processes if device.type == "cpu" else 1
        wanted, there = self.peak_bytes / 2**30, free_bytes(device) / sharing / 2**30
        said = f"its {self.largest} will take about {wanted:.1f} GiB of memory, and {there:.1f} GiB are free"
        if wanted > (1 + MARGIN) * there:
            raise UserError(f"this run does not fit: {said}", f"These help: {', '.join(flags)}")
        if wanted > (1 - MARGIN) * there:
            say(f"this may not fit: {said}. These help: {', '.join(flags)}")


def measure(
    device: torch.device, *loaded: nn.Module, heap: Heap | None = None, **phases: Callable[[], object]
) -> Memory:
    """Go through phases of a run one after another, on tensors without values; what one leaves behind stays.

    Modules that are `loaded` stand among the phases' tensors, so they don't count as part of the process. A run that
    changes how memory is taken says so by its `heap`.
    """
    found, unknown = dict[str, int](), list[str]()
    with (
        mock.patch.object(nn.Module, "_apply", _apply),
        FakeTensorMode(allow_non_fake_inputs=True),
        _AnyValue(),
        _Count(device, heap or Heap()) as count,
    ):
        for name, work in phases.items():
            count.peak_bytes = count.taken_bytes
            try:
                work()
            except Exception:
                unknown.append(name)  # whatever hangs on values: to know less is no reason not to run
            found[name] = count.peak_bytes
    process_bytes = 0
    if device.type == "cpu":
        held = [tensor for module in loaded for tensor in (*module.parameters(), *module.buffers())]
        kernels = _KERNELS_BYTES * (2 if count.saw_backward else 1)
        process_bytes = psutil.Process().memory_info().rss + kernels - sum(tensor.nbytes for tensor in held)
    return Memory(phases=found, unknown=tuple(unknown), process_bytes=process_bytes)


def without_values(module: Module, device: torch.device) -> Module:
    """Copy a module, with tensors that have no values; to be called in a phase."""
    copied: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device=device, requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        copied[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, copied)


_KILLED_WORKER = re.compile(r"DataLoader worker \(pid \d+\) is killed by signal: (Killed|Bus error)")
"""What PyTorch says where the system, short of memory, ended a process that reads images."""


def why_full(error: BaseException) -> str:
    """Say which memory did not suffice; empty for an error of any other kind."""
    said = f"{error} {error.__cause__ or ''}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device's memory is full ({str(error).split('. ')[0]})"
    if isinstance(error, RuntimeError) and _KILLED_WORKER.search(said):
        return "the machine's memory is full, and a process that reads images was killed; --num-workers 0 has none"
    is_full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if is_full or (isinstance(error, RuntimeError) and "can't allocate memory" in said):
        return "the machine's memory is full"
    return ""


@contextlib.contextmanager
def told_when_full(flags: Sequence[str]) -> Iterator[None]:
    """Say in one line that memory did not suffice, and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if reason := why_full(error):
            raise UserError(reason, f"These help: {', '.join(flags)}") from None
        raise


_GROUP = Path("/sys/fs/cgroup")
"""What Linux says of the group of processes that this one is in, a container's say."""


def free_bytes(device: torch.device) -> int:
    """Ask how much memory is free, in bytes: of an accelerator, or of the machine and this process's group in it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    own = psutil.Process().memory_info().rss  # what this process has counts as free: it is part of what it will take
    available = psutil.virtual_memory().available + own
    limit, used, kinds = (_GROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if limit.exists() and limit.read_text().strip().isdigit():
        sizes = dict(line.split() for line in kinds.read_text().splitlines())
        cached = int(sizes["active_file"]) + int(sizes["inactive_file"])  # of files: the system gives it back
        available = min(available, int(limit.read_text()) - int(used.read_text()) + cached + own)
    return available


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert a module's tensors one by one: PyTorch's own way swaps them in place, which these can't have done."""
    for child in module.children() if recurse else ():
        child._apply(change)
    held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in held:
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            with torch.no_grad():
                changed = change(tensor)
            if changed is not tensor:
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(changed, tensor.requires_grad) if is_parameter else changed
    return module


class _Count(TorchDispatchMode):
    """Counts the bytes of all storages on a device that come into being, until they go."""

    def __init__(self, device: torch.device, heap: Heap) -> None:
        super().__init__()
        self._device, self._heap, self._known = device, heap, set[int]()
        self._live_bytes = self.peak_bytes = 0
        self.saw_backward = False

    @property
    def taken_bytes(self) -> int:
        return self._heap.taken_bytes if self._device.type == "cpu" else self._live_bytes

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        self.saw_backward |= torch._C._current_graph_task_id() >= 0
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device.type:
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live_bytes += num_bytes
        block = self._heap.take(num_bytes)
        self.peak_bytes = max(self.peak_bytes, self.taken_bytes)

        def remove() -> None:
            self._known.discard(key)
            self._live_bytes -= num_bytes
            self._heap.give_back(block)

        weakref.finalize(storage, remove)


_VALUES: Mapping[Any, Any] = {
    Tensor.__float__: 1.0, Tensor.__bool__: True, Tensor.__int__: 1, Tensor.__index__: 1,
}  # fmt: skip


def _any_value(tensor: Tensor) -> float | int:
    return 1.0 if tensor.is_floating_point() else 1


class _AnyValue(TorchFunctionMode):
    """Lets tensors without values have some where code asks for a number: all is finite, nothing stops."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in _VALUES:
            return _VALUES[function]
        if function is Tensor.item:
            return _any_value(arguments[0])
        if function is Tensor.tolist:
            return [_any_value(arguments[0])] * arguments[0].numel()
        if function is Tensor.__deepcopy__:
            tensor, memo = arguments
            copied = torch.empty_like(tensor.detach())
            memo[id(tensor)] = (
                nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
            )
            return memo[id(tensor)]
        return function(*arguments, **(options or {}))
