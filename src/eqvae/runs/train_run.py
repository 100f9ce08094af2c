"""A training run in progress: steps, journal, checkpoints, samples now and then, export."""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from eqvae.artifacts import JOURNAL, METRICS, read_journal, write_json
from eqvae.errors import Interrupted, NotFiniteError, UserError
from eqvae.generators.checkpoints import GeneratorCard, Weights, write_generator
from eqvae.generators.families import BackboneConfig
from eqvae.generators.protocol import Objective
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.journal import Journal
from eqvae.runtime.processes import Processes
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import StopRequest
from eqvae.runtime.throughput import count_flops, matrix_peak_flops_per_sec
from eqvae.training.checkpoint import read_checkpoint, write_checkpoint
from eqvae.training.generator_step import TrainingBatch, TrainState, train_step

CHECKPOINT = "checkpoint.safetensors"
SNAPSHOTS = "snapshots"
"""Folder of the power-function averages."""

_DRAWS = 1  # what a random stream is for

_OWN_KEYS = ("kind", "step", "training_sec")  # of a validation's record, besides the watch's figures

Batches = Callable[[int, int], Generator[TrainingBatch, None, None]]
"""From the first step and the number of steps to this process's batches, without the objective's draws."""

Watch = Callable[[int], dict[str, float | int]]
"""Samples from the exported weights after a step, draws pictures, and measures what it was asked to."""


@dataclass(kw_only=True)
class Run:
    """One process's part of a run."""

    config: TrainConfig
    processes: Processes
    state: TrainState
    objective: Objective
    card: GeneratorCard
    batches: Batches
    watch: Watch
    journal: Journal | None
    """Of the first process."""
    stop: StopRequest
    training_sec: float = 0.0
    """Spent in training steps, over all sessions."""
    watched_step: int = 0
    """Step of the last watch."""
    last_figures: dict[str, float | int] = field(default_factory=dict)
    """Of the last watch."""

    def train(self) -> dict[str, Any]:
        """Take all steps that are left, and finish."""
        config, state = self.config, self.state
        shared = self._share()
        if self._is_recorded():
            self._watch_where_due()  # what an earlier session was stopped before
        flops_per_image, peak = 3.0 * transformer_flops(state.transformer.config), 0.0
        if state.step < config.max_steps:
            peak = matrix_peak_flops_per_sec(self.processes.device, config.precision) * self.processes.count
        with (
            contextlib.closing(self.batches(state.step, config.max_steps - state.step)) as batches,
            self.processes.progress("train", total=config.max_steps, start=state.step) as progress,
        ):
            began_sec, began_step = time.perf_counter(), state.step
            for batch in batches:
                losses = self._step(batch, shared)
                if not (self._is_recorded() or self._is_stopped_alone()):
                    continue
                means = self._means(losses)  # waits for the device, so that the clock can be read
                elapsed_sec = time.perf_counter() - began_sec
                self.training_sec += elapsed_sec
                rate = (state.step - began_step) * config.batch_size / elapsed_sec
                if progress is not None:
                    progress.advance(state.step - began_step, loss=means["loss"], images_per_sec=rate)
                if self._is_recorded():
                    self._log(means, rate, rate * flops_per_image / peak)
                self._stop_if_asked()
                if self._is_due(config.checkpoint_every, since=began_step):
                    self._write_checkpoint()
                self._watch_where_due()
                began_sec, began_step = time.perf_counter(), state.step
        return self._finish()

    def resume(self) -> None:
        """Load the checkpoint where there is one; the journal says what has been watched up to it."""
        path = self.config.out / CHECKPOINT
        if not path.exists():
            return
        tensors, numbers = read_checkpoint(path)
        if numbers["step"] > self.config.max_steps:
            raise UserError(
                f"'{self.config.out}' is at step {numbers['step']}, beyond --max-steps {self.config.max_steps}",
                "Give as many or more, or another --out",
            )
        self.state.load(tensors, numbers["step"])
        self.training_sec = numbers["training_sec"]
        records = read_journal(self.config.out) if (self.config.out / JOURNAL).exists() else []
        for record in records:
            if record["kind"] == "validation" and record["step"] <= self.state.step:
                self.watched_step = record["step"]
                self.last_figures = {name: record[name] for name in record if name not in _OWN_KEYS}

    def _share(self) -> nn.Module:
        """The learner, compiled where asked for, wrapped where several processes average their gradients."""
        learner = self.state.learner
        if self.config.gradient_checkpointing:
            learner.transformer.gradient_checkpointing = True
        if self.config.compile:
            learner.transformer.compile()  # in place, so that the weights keep their names
        if self.processes.count == 1:
            return learner
        # The precision is ours to choose, whatever `accelerate config` says.
        return Accelerator(cpu=self.processes.device.type == "cpu", mixed_precision="no").prepare_model(learner)

    def _step(self, batch: TrainingBatch, shared: nn.Module) -> dict[str, Tensor]:
        """Draw the step's randomness for the global batch, take this process's rows, and step."""
        state, device = self.state, self.processes.device
        draws = self.objective.draw(
            self.config.batch_size, self.card.transformer.latents, generator_for(self.config.seed, state.step, _DRAWS)
        )
        first = self.processes.rank * len(batch.latents)
        own = {name: value[first : first + len(batch.latents)] for name, value in draws.items()} | batch.draws
        try:
            return train_step(
                state,
                replace(
                    batch,
                    latents=batch.latents.to(device, non_blocking=True),
                    labels=batch.labels.to(device, non_blocking=True),
                    draws={name: value.to(device, non_blocking=True) for name, value in own.items()},
                ),
                self.config,
                shared,
            )
        except NotFiniteError as error:
            self._write_checkpoint()
            raise UserError(
                f"training diverged at step {state.step} ({error}); the state before it is in "
                f"'{self.config.out / CHECKPOINT}'",
                "Start again in another --out with a lower --learning-rate, or with --max-grad-norm 1",
            ) from None

    def _means(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Average over processes, which have equal parts of the batch."""
        total = self.processes.sum(torch.stack([value.double() for value in losses.values()]))
        return dict(zip(losses, (total / self.processes.count).tolist(), strict=True))

    def _log(self, means: dict[str, float], images_per_sec: float, share_of_peak: float) -> None:
        if self.journal is not None:
            self.journal.write(
                "train",
                step=self.state.step,
                **means,
                images_per_sec=images_per_sec,
                share_of_peak=share_of_peak,
                training_sec=self.training_sec,
            )

    def _is_recorded(self) -> bool:
        """Whether this step goes into the journal; checkpoints and watches follow such steps only."""
        return self.state.step % self.config.log_every == 0 or self.state.step == self.config.max_steps

    def _is_stopped_alone(self) -> bool:
        """Whether a signal came; several processes have to agree first, which they do at recorded steps."""
        return self.processes.count == 1 and bool(self.stop)

    def _is_due(self, every: int, *, since: int) -> bool:
        """Whether a multiple of `every`, or the end, lies between an earlier step and this one."""
        step = self.state.step
        return step // every > since // every or step == self.config.max_steps != since

    def _watch_where_due(self) -> None:
        """Export and look at samples."""
        step = self.state.step
        if not self._is_due(self.config.sample_every or 1, since=self.watched_step):
            return
        self._export()
        self.watched_step, self.last_figures = step, self.watch(step)
        if self.journal is not None:
            self.journal.write("validation", step=step, training_sec=self.training_sec, **self.last_figures)
        self.processes.wait()

    def _stop_if_asked(self) -> None:
        """End the run after a signal to any of the processes, with a checkpoint."""
        names = [name for name in self.processes.gather(self.stop.signal_name) if name]
        if names:
            self._write_checkpoint()
            raise Interrupted(
                f"{names[0]} at step {self.state.step}; the same command goes on from '{self.config.out}'"
            )

    def _write_checkpoint(self) -> None:
        if self.processes.is_first:
            numbers = {"step": self.state.step, "training_sec": self.training_sec}
            write_checkpoint(self.config.out / CHECKPOINT, self.state.tensors(), numbers)

    def _export(self) -> None:
        """Write the weights to sample from; with power-function averages, also a snapshot of them."""
        if self.processes.is_first:
            weights: dict[Weights, Mapping[str, Tensor]] = {
                "ema": self.state.average.weights(),
                "model": self.state.transformer.state_dict(),
            }
            write_generator(self.config.out, replace(self.card, num_steps=self.state.step), weights)
            if self.state.power_averages is not None:
                self.state.power_averages.write_snapshots(self.config.out / SNAPSHOTS)
        self.processes.wait()

    def _finish(self) -> dict[str, Any]:
        config, state = self.config, self.state
        metrics = self.last_figures | {
            "num_steps": state.step,
            "num_images": state.step * config.batch_size,
            "num_parameters": state.transformer.num_parameters(),
            "training_sec": self.training_sec,
            "training_images_per_sec": state.step * config.batch_size / max(self.training_sec, 1e-9),
        }
        if self.processes.is_first:
            write_json(config.out / METRICS, metrics)
        self.processes.wait()
        return metrics


def transformer_flops(config: BackboneConfig) -> int:
    """Count the operations of one image's forward pass, on the meta device."""
    with torch.device("meta"):
        return count_flops(config.build(), *config.example())
