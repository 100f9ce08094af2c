"""A generator's training run: the loop's step, watch and export."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from eqvae.artifacts.files import write_json
from eqvae.artifacts.names import METRICS, SNAPSHOTS
from eqvae.generators.checkpoints import GeneratorCard, Weights, write_generator
from eqvae.generators.families import BackboneConfig
from eqvae.generators.protocol import Objective
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import count_flops, matrix_peak_flops_per_sec
from eqvae.runtime.journal import Journal
from eqvae.runtime.processes import Processes, StopRequest
from eqvae.runtime.seeds import generator_for
from eqvae.training.generator_step import TrainingBatch, TrainState, train_step
from eqvae.training.loop import Loop, Schedule

_DRAWS = 1  # what a random stream is for

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
    loop: Loop[TrainingBatch] = field(init=False)
    shared: nn.Module = field(init=False)
    """The learner as all processes train it."""

    def __post_init__(self) -> None:
        """Set up the loop."""
        config = self.config
        self.loop = Loop(
            title="train",
            out=config.out,
            processes=self.processes,
            schedule=Schedule(
                max_steps=config.max_steps, batch_size=config.batch_size, log_every=config.log_every,
                checkpoint_every=config.checkpoint_every, watch_every=config.sample_every or 1, watch_last=True,
            ),
            state=self.state,
            batches=self.batches,
            take_step=self._step,
            watch=self._watch,
            stop=self.stop,
            shown={"loss": "loss", "images_per_sec": "images_per_sec"},
            mend="Start again in another --out with a lower --learning-rate, or with --max-grad-norm 1",
        )  # fmt: skip

    def resume(self) -> None:
        """Load the checkpoint where there is one."""
        self.loop.resume()

    def train(self) -> dict[str, Any]:
        """Take all steps that are left, and write the final figures."""
        config, state, loop = self.config, self.state, self.loop
        loop.journal, self.shared = self.journal, self._share()
        if state.step < config.max_steps:
            peak = matrix_peak_flops_per_sec(self.processes.device, config.precision) * self.processes.count
            share_per_rate = 3.0 * transformer_flops(state.transformer.config) / peak
            loop.figures_of_rate = lambda images_per_sec: {"share_of_peak": images_per_sec * share_per_rate}
        loop.train()
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        config, state, loop = self.config, self.state, self.loop
        metrics = loop.last_figures | {
            "num_steps": state.step,
            "num_images": state.step * config.batch_size,
            "num_parameters": state.transformer.num_parameters(),
            "training_sec": loop.training_sec,
            "training_images_per_sec": state.step * config.batch_size / max(loop.training_sec, 1e-9),
        }
        if self.processes.is_first:
            write_json(config.out / METRICS, metrics)
        self.processes.wait()
        return metrics

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

    def _step(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Draw the step's randomness for the global batch, take this process's rows, and step."""
        state, device = self.state, self.processes.device
        draws = self.objective.draw(
            self.config.batch_size, self.card.transformer.latents, generator_for(self.config.seed, state.step, _DRAWS)
        )
        first = self.processes.rank * len(batch.latents)
        own = {name: value[first : first + len(batch.latents)] for name, value in draws.items()} | batch.draws
        return train_step(
            state,
            replace(
                batch,
                latents=batch.latents.to(device, non_blocking=True),
                labels=batch.labels.to(device, non_blocking=True),
                draws={name: value.to(device, non_blocking=True) for name, value in own.items()},
            ),
            self.config,
            self.shared,
        )

    def _watch(self, step: int) -> dict[str, float | int]:
        """Write the weights to sample from, with power-function averages a snapshot of them, and look at samples."""
        if self.processes.is_first:
            weights: dict[Weights, Mapping[str, Tensor]] = {
                "ema": self.state.average.weights(),
                "model": self.state.transformer.state_dict(),
            }
            write_generator(self.config.out, replace(self.card, num_steps=step), weights)
            if self.state.power_averages is not None:
                self.state.power_averages.write_snapshots(self.config.out / SNAPSHOTS)
        self.processes.wait()
        return self.watch(step)


def transformer_flops(config: BackboneConfig) -> int:
    """Count the operations of one image's forward pass, on the meta device."""
    with torch.device("meta"):
        return count_flops(config.build(), *config.example())
