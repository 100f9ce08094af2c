"""How a run goes, whatever it trains, on one process or several: steps, journal, checkpoints, watches, stops."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from eqvae.artifacts.files import read_journal, to_plain, write_json
from eqvae.artifacts.names import CHECKPOINT, DIVERGED
from eqvae.errors import Interrupted, NotFiniteError, UserError
from eqvae.runtime.device import widest_float
from eqvae.runtime.journal import Journal, say
from eqvae.runtime.processes import Processes
from eqvae.runtime.signals import StopRequest
from eqvae.training.checkpoints import keep_milestone, read_latest_checkpoint, write_checkpoint
from eqvae.training.divergence import Guard

Batch = TypeVar("Batch")

Figures = Mapping[str, Any]
"""Numbers by name; in a step's, tensors are means over this process's images."""

_OWN_KEYS = ("kind", "step", "training_sec")  # of a validation's record, besides the watch's figures


@runtime_checkable
class State(Protocol):
    """What is trained: all that a resume needs."""

    step: int

    guard: Guard

    def tensors(self) -> dict[str, Tensor]:
        """Collect the state for a checkpoint, in all processes at once; the first process's counts."""
        ...

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Put back what `tensors` collected."""
        ...


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things happen, in steps."""

    max_steps: int
    batch_size: int
    """Of all processes together."""
    log_every: int
    checkpoint_every: int
    keep_every: int
    """Checkpoints of its multiples are kept; 0 keeps none."""
    keep_last: int
    """Of them at most so many stay; 0: all."""
    watch_every: int
    watch_last: bool
    """Whether the last step is watched too; a fine-tuning run measures what it exports anyway."""


@dataclass(kw_only=True)
class Loop(Generic[Batch]):
    """One process's part of a run."""

    title: str
    out: Path
    processes: Processes
    schedule: Schedule
    state: State
    batches: Callable[[int, int], Generator[Batch, None, None]]
    """From the first step and the number of steps to this process's batches."""
    take_step: Callable[[Batch], Figures]
    """Takes one step of the state."""
    describe: Callable[[Batch], dict[str, Any]]
    """Says which images a step is made of, and what was drawn for it."""
    watch: Callable[[int], dict[str, float | int]]
    """Looks at the trained weights after a step, draws pictures, and measures."""
    stop: StopRequest
    shown: Mapping[str, str]
    """What the progress bar calls some of the figures."""
    mend: str
    """What helps against divergence."""
    journal: Journal | None = None
    """Of the first process."""
    figures_of_rate: Callable[[float], dict[str, float]] = lambda images_per_sec: {}
    """What follows from the images per second."""
    on_record: Callable[[str, Figures], None] = lambda kind, figures: None
    """Is told what the journal is told."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the checkpoint keeps beside tensors, step and time."""
    training_sec: float = 0.0
    """Spent in training steps, over all sessions."""
    device_sec: float = 0.0
    """Of this process's device in them: on CPUs processor time, which a busy machine does not lengthen. The first
    process's holds what all of them had taken when the checkpoint was written that it goes on from."""
    watched_step: int = 0
    """Step of the last watch."""
    saved_step: int | None = None
    """Step of the latest checkpoint."""
    damage: str | None = None
    """What is wrong with the latest checkpoint, where the one before was taken."""
    last_figures: dict[str, float | int] = field(default_factory=dict)
    """Of the last watch."""

    def resume(self) -> None:
        """Load the latest checkpoint that is whole; the journal says what has been watched up to it."""
        found = read_latest_checkpoint(self.out)
        if found is None:
            return
        numbers, self.damage = found.numbers, found.damage
        step = numbers.pop("step")
        if step > self.schedule.max_steps:
            raise UserError(
                f"'{self.out}' is at step {step}, beyond --max-steps {self.schedule.max_steps}",
                "Give as many or more, or another --out",
            )
        self.state.load(found.tensors, step)
        self.saved_step = step
        self.training_sec = numbers.pop("training_sec")
        device_sec = numbers.pop("device_sec", 0.0)  # of all processes; an older checkpoint has none
        self.device_sec = device_sec if self.processes.is_first else 0.0
        self.numbers |= numbers
        for record in read_journal(self.out):
            if record.get("kind") == "validation" and record["step"] <= step:
                self.watched_step = record["step"]
                self.last_figures = {name: record[name] for name in record if name not in _OWN_KEYS}

    def train(self) -> None:
        """Take all steps that are left."""
        schedule, state = self.schedule, self.state
        self._tell_damage()
        self._keep_where_due()  # these, and what is watched, an earlier session may have been stopped before
        self._watch_where_due()
        with (
            contextlib.closing(self.batches(state.step, schedule.max_steps - state.step)) as batches,
            self.processes.progress(self.title, total=schedule.max_steps, start=state.step) as progress,
        ):
            began_sec, began_step, shown = time.perf_counter(), state.step, dict[str, float]()
            began_device_sec = self._device_clock()
            for batch in batches:
                figures = self._step(batch)
                is_stopping = self.processes.any(bool(self.stop))
                is_boundary = is_stopping or self._is_boundary()
                if is_boundary:
                    figures = self._means(figures)  # waits for the device, so that the clock can be read
                    elapsed_sec = time.perf_counter() - began_sec
                    self.training_sec += elapsed_sec
                    self.device_sec += self._device_clock() - began_device_sec
                    rate = (state.step - began_step) * schedule.batch_size / elapsed_sec
                    figures |= {"images_per_sec": rate, **self.figures_of_rate(rate)}
                    shown = {label: figures[name] for label, name in self.shown.items()}
                if progress is not None:
                    progress.advance(1, **shown)
                if not is_boundary:
                    continue
                if self._is_recorded():
                    self.write("train", **figures)
                if is_stopping:
                    self.end_early()
                if self._is_checkpoint_due():
                    self.write_checkpoint()
                self._watch_where_due()
                began_sec, began_step = time.perf_counter(), state.step
                began_device_sec = self._device_clock()

    def total_device_sec(self) -> float:
        """Sum up what training has taken of all processes' devices: processor time on CPUs. All of them call it."""
        return sum(self.processes.gather(self.device_sec))

    def _device_clock(self) -> float:
        return time.process_time() if self.processes.device.type == "cpu" else time.perf_counter()

    def look(self) -> dict[str, float | int]:
        """Watch now, and write down what is found."""
        self.watched_step, self.last_figures = self.state.step, self.watch(self.state.step)
        self.write("validation", **self.last_figures)
        self.processes.wait()
        return self.last_figures

    def write(self, kind: str, **figures: Any) -> None:
        """Write a record of this step into the journal."""
        if self.journal is not None:
            self.journal.write(kind, step=self.state.step, **figures, training_sec=self.training_sec)
            self.on_record(kind, figures)

    def write_checkpoint(self) -> None:
        """Write all that a resume needs."""
        tensors, device_sec = self.state.tensors(), self.total_device_sec()
        if self.processes.is_first:
            times = {"training_sec": self.training_sec, "device_sec": device_sec}
            numbers = {"step": self.state.step, **self.numbers, **times}
            # A damaged checkpoint must not take the place of the whole one before, nor one of the same step.
            rotate = self.damage is None and self.saved_step != self.state.step
            write_checkpoint(self.out, tensors, numbers, rotate=rotate)
        self.damage, self.saved_step = None, self.state.step
        self._keep_where_due()
        self.processes.wait()

    def end_early(self) -> None:
        """End after a signal to any of the processes, with a checkpoint; all of them have to come here."""
        name = next(name for name in self.processes.gather(self.stop.signal_name) if name)
        self.write_checkpoint()
        raise Interrupted(f"{name} at step {self.state.step}; the same command goes on from '{self.out}'")

    def _step(self, batch: Batch) -> Figures:
        """Take one step, or stop the run at its last good state."""
        try:
            figures = self.take_step(batch)
        except NotFiniteError as error:
            self.write_checkpoint()
            self._write_divergence(batch, error)
            raise UserError(
                f"training diverged at step {self.state.step} ({error}); the state before it is in "
                f"'{self.out / CHECKPOINT}', and what the step was made of in '{self.out / DIVERGED}'",
                self.mend,
            ) from None
        jump = self.state.guard.jump
        if jump is not None and self.journal is not None:
            say(f"step {self.state.step}: {jump}")
            self.write("jump", **to_plain(jump))
        return figures

    def _write_divergence(self, batch: Batch, error: NotFiniteError) -> None:
        """Write down what a step was made of that did not go well: images, draws, terms."""
        parts = self.processes.gather(self.describe(batch))
        if self.processes.is_first:
            terms = {name: value if math.isfinite(value) else str(value) for name, value in error.terms.items()}
            record = {"step": self.state.step, "began": error.began, "terms": terms, "draws": error.draws}
            write_json(self.out / DIVERGED, record | {"processes": parts})

    def _means(self, figures: Figures) -> dict[str, Any]:
        """Average a step's tensors over processes, which have equal parts of the batch."""
        wide = widest_float(self.processes.device)
        tensors = {name: value.to(wide) for name, value in figures.items() if isinstance(value, Tensor)}
        if not tensors:
            return dict(figures)
        means = self.processes.average(torch.stack(list(tensors.values()))).tolist()
        return {**figures, **dict(zip(tensors, means, strict=True))}

    def _is_recorded(self) -> bool:
        """Whether this step goes into the journal."""
        return self.state.step % self.schedule.log_every == 0 or self.state.step == self.schedule.max_steps

    def _is_checkpoint_due(self) -> bool:
        step, schedule = self.state.step, self.schedule
        return step % schedule.checkpoint_every == 0 or step == schedule.max_steps or self._is_kept()

    def _is_kept(self) -> bool:
        """Whether the checkpoint of this step stays for good."""
        step, every = self.state.step, self.schedule.keep_every
        return every > 0 and step > 0 and step % every == 0

    def _is_watch_due(self) -> bool:
        """Whether a multiple of `watch_every`, or the end, lies between the last watch and this step."""
        step, every = self.state.step, self.schedule.watch_every
        if step == self.schedule.max_steps:
            return self.schedule.watch_last and step != self.watched_step
        return step // every > self.watched_step // every

    def _is_boundary(self) -> bool:
        """Whether anything but the next step follows, so that the clock is read and figures are fetched."""
        return self._is_recorded() or self._is_checkpoint_due() or self._is_watch_due()

    def _watch_where_due(self) -> None:
        if self._is_watch_due():
            self.look()

    def _keep_where_due(self) -> None:
        is_latest = self.saved_step == self.state.step and self.damage is None
        if self.processes.is_first and is_latest and self._is_kept():
            schedule = self.schedule
            keep_milestone(self.out, self.state.step, every=schedule.keep_every, num_kept=schedule.keep_last)

    def _tell_damage(self) -> None:
        """Say, and write down, that the checkpoint before the latest was taken."""
        if self.damage is not None and self.processes.is_first:
            message = f"{self.damage}: going on from the checkpoint before it, of step {self.state.step}"
            say(message)
            self.write("damaged_checkpoint", message=message)
