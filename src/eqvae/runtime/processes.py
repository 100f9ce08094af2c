"""One process among several: who am I, wait, sum and gather. Started by torchrun or `accelerate launch`."""

import atexit
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor

from eqvae.runtime.progress import Progress

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that share a piece of work; a single one where nothing launched more."""

    rank: int
    """This process: 0 ... count - 1."""

    count: int

    device: torch.device
    """Where this process computes: with several accelerators, each process has its own."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    @contextlib.contextmanager
    def progress(self, title: str, *, total: int, start: int = 0, unit: str = "step") -> Iterator[Progress | None]:
        """Show the first process's progress, which stands for the others'."""
        if not self.is_first or total == 0:
            yield None
            return
        with Progress(title, total=total, start=start, unit=unit) as progress:
            yield progress

    def sum(self, value: Tensor) -> Tensor:
        """Add up a tensor over processes."""
        if self.count == 1:
            return value
        total = value.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    def gather(self, value: Value) -> list[Value]:
        """Collect an object from each process."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def join_processes(device: torch.device) -> Processes:
    """Join the processes that torchrun, `accelerate launch` or a scheduler started; alone where none did."""
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1 and torch.distributed.get_backend() == "gloo":
        atexit.register(_leave_processes)
    own = state.device if state.num_processes > 1 and device.type == "cuda" else device
    return Processes(rank=state.process_index, count=state.num_processes, device=own)


def _leave_processes() -> None:
    """Close gloo's connections while Python is still whole.

    Left open, a thread of gloo's that frees a tensor during Python's finalization ends a finished process by SIGABRT
    (github.com/pytorch/pytorch/pull/179291).
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
