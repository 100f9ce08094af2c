"""One process among several, as torchrun or `accelerate launch` starts them."""

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed
import torch.distributed.nn.functional
from accelerate import PartialState
from torch import Tensor
from torch.nn import Parameter

from eqvae.errors import ProcessLost, UserError
from eqvae.runtime.company import keep_company
from eqvae.runtime.journal import Progress

Value = TypeVar("Value")

_BUCKET_SIZE = 2**24
"""Gradients that travel together: 64 MiB in float32."""


_POLL_SEC = 0.2


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

    @property
    def num_cores(self) -> int:
        """Processor cores for each process of this machine, of those that may be used."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", self.count)))

    def check_batch(self, batch_size: int, num_parts: int) -> None:
        """Refuse a batch that can't be split over the processes and into as many equal parts for each."""
        if batch_size % (self.count * num_parts):
            raise UserError(
                f"--batch-size {batch_size} can't be split over {self.count} processes and {num_parts} equal parts",
                f"Choose a multiple of {self.count * num_parts}",
            )

    def own_part(self, num_items: int) -> slice:
        """Share out a list: this process's part of it, such that the parts in order are the whole."""
        return slice(self.rank * num_items // self.count, (self.rank + 1) * num_items // self.count)

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

    def average(self, value: Tensor) -> Tensor:
        """Average a tensor over processes, each of which stands for as many images."""
        return value if self.count == 1 else self.sum(value) / self.count

    def any(self, flag: bool) -> bool:
        """Whether it holds for any of the processes; all of them get the same answer."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def join(self, rows: Tensor) -> Tensor:
        """Put all processes' rows together, in the order of ranks; each has as many."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def average_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Average gradients over processes, many at a time."""
        if self.count == 1:
            return
        pending: list[Tensor] = []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for index, gradient in enumerate(gradients):
            pending.append(gradient)
            if sum(each.numel() for each in pending) < _BUCKET_SIZE and index < len(gradients) - 1:
                continue
            means = self.average(torch.cat([each.flatten() for each in pending]))
            for each, mean in zip(pending, means.split([each.numel() for each in pending]), strict=True):
                each.copy_(mean.view_as(each))
            pending = []

    def gather(self, value: Value) -> list[Value]:
        """Collect an object from each process."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
"""A single process, wherever it computes."""


def count_processes() -> int:
    """Count the processes that work together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def sum_with_gradient(value: Tensor) -> Tensor:
    """Add up a tensor over processes as a step of the graph: each process's loss sends its gradient to all."""
    return torch.distributed.nn.functional.all_reduce(value)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed since another process is gone; gloo says it in words alone."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def wait_for_file(path: Path, stop_if_asked: Callable[[], object] = lambda: None) -> None:
    """Wait until another process has written a file; where it failed, its launcher ends us.

    No collective waits so long: they end a process after ten or thirty minutes.
    """
    while not path.exists():
        stop_if_asked()
        time.sleep(_POLL_SEC)


@contextlib.contextmanager
def notice_lost_process(and_now: str) -> Iterator[None]:
    """Say in one line that another process is gone, and what the same command would do."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise ProcessLost(f"another process ended; {and_now}") from None


def join_processes(device: torch.device) -> Processes:
    """Join the processes that torchrun, `accelerate launch` or a scheduler started; alone where none did."""
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1 and torch.distributed.get_backend() == "gloo":
        atexit.register(_leave_processes)
    keep_company(state.process_index, state.num_processes)
    own = state.device if state.num_processes > 1 and device.type == "cuda" else device
    return Processes(rank=state.process_index, count=state.num_processes, device=own)


def _leave_processes() -> None:
    """Close gloo's connections while Python is still whole.

    Left open, a thread of gloo's that frees a tensor during Python's finalization ends a finished process by SIGABRT
    (github.com/pytorch/pytorch/pull/179291).
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
