"""A run in progress: train, validate, checkpoint, export."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from eqvae.artifacts import (
    AUTOENCODER,
    METRICS,
    ModelCard,
    Pictures,
    replace_folder,
    to_plain,
    write_atomically,
    write_json,
)
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, LatentStatistics
from eqvae.errors import Interrupted, NotFiniteError, UserError
from eqvae.images import ImageBatch, ImageSource, evaluation_batches, training_batches
from eqvae.losses.adversarial import Watchdog
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.metrics.autoencoder import LatentMoments, evaluate_autoencoder
from eqvae.runs.finetune_config import FinetuneConfig
from eqvae.runtime.device import autocast
from eqvae.runtime.journal import Journal, installed_version
from eqvae.runtime.processes import Processes
from eqvae.runtime.progress import Progress
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import StopRequest
from eqvae.training.autoencoder_state import TrainState, set_training
from eqvae.training.autoencoder_step import StepRecord, train_step
from eqvae.training.checkpoint import write_checkpoint
from eqvae.transforms import TransformSampler

CHECKPOINT = "checkpoint.safetensors"
VALIDATION = "validation"
"""Folder of the pictures of each validation: rows x, D(E(tau o x)), D(tau o E(x))."""


@dataclass(kw_only=True)
class Run:
    """One process's part of a run."""

    config: FinetuneConfig
    device: torch.device
    state: TrainState
    reconstruction_loss: ReconstructionLoss
    source: ImageSource
    validation_source: ImageSource
    journal: Journal
    sampler: TransformSampler
    before: dict[str, float | int] = field(default_factory=dict)
    """Validation of the base."""
    training_sec: float = 0.0
    """Spent in training steps, over all sessions."""
    step_sec: float = 0.0
    """Spent in the last step."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    stop: StopRequest
    """Set by a signal."""
    named: set[str] = field(default_factory=set)
    """Broken images that the journal names already."""
    board: Any = None
    """TensorBoard's writer, where it is asked for."""

    def train(self) -> None:
        """Take all steps that are left."""
        config, state = self.config, self.state
        if config.compile:
            decode = "decode_quantized" if isinstance(state.autoencoder, DiscreteAutoencoder) else "decode"
            for name in ("encode", decode):
                setattr(state.autoencoder, name, torch.compile(getattr(state.autoencoder, name)))
        batches = training_batches(
            self.source,
            image_size_px=config.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            first_step=state.step,
            num_steps=config.max_steps - state.step,
            flip=config.flip,
            num_workers=config.num_workers,
        )
        with (
            _open_board(config, state.step) as self.board,
            contextlib.closing(batches),
            Progress("finetune", total=config.max_steps, start=state.step) as progress,
        ):
            for batch in batches:
                record = self._step(batch)
                progress.advance(l1=record.l1, loss=record.reconstruction)
                self._log(record, progress)
                self.stop_if_asked()
                done = state.step == config.max_steps
                if state.step % config.checkpoint_every == 0 or done:
                    self.write_checkpoint()
                if state.step % (config.validate_every or 1) == 0 and not done:
                    progress.say(_validation_line(state.step, self.validate()))

    def stop_if_asked(self) -> None:
        """End the run after a signal, with a checkpoint."""
        if self.stop:
            self.write_checkpoint()
            raise Interrupted(
                f"{self.stop.signal_name} at step {self.state.step}; the same command goes on from '{self.config.out}'"
            )

    def _step(self, batch: ImageBatch) -> StepRecord:
        """Take one step, or stop the run at its last good state."""
        self._name_broken(batch)
        began_sec = time.perf_counter()
        try:
            record = train_step(
                self.state, batch.images.to(self.device), self.config, self.reconstruction_loss, self.sampler
            )
        except NotFiniteError as error:
            self.write_checkpoint()
            raise UserError(
                f"training diverged at step {self.state.step} ({error}); the state before it is in "
                f"'{self.config.out / CHECKPOINT}'",
                "Start again in another --out with a lower --learning-rate or --adversarial-weight 0",
            ) from None
        self.step_sec = time.perf_counter() - began_sec
        self.training_sec += self.step_sec
        return record

    def _log(self, record: StepRecord, progress: Progress) -> None:
        """Write the journal's record where one is due, and what the watchdog says."""
        step = self.state.step
        if step % self.config.log_every == 0:
            figures = record.figures() | {"images_per_sec": self.config.batch_size / self.step_sec}
            self.journal.write("train", step=step, **figures)
            self._draw_scalars("train", figures)
        if self.state.discriminator is not None and (verdict := self.watchdog.look(record.discriminator)):
            self.journal.write("watchdog", step=step, message=verdict)
            progress.say(f"step {step}: {verdict}")

    def _draw_scalars(self, kind: str, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            if self.board is not None and isinstance(value, float):
                self.board.add_scalar(f"{kind}/{name}", value, self.state.step)

    def validate(self) -> dict[str, float | int]:
        """Measure the weights that would be exported, and draw their pictures."""
        config, state = self.config, self.state
        figures, _, pictures = evaluate_autoencoder(
            state.exported(),
            self._evaluation_images(self.validation_source, config.num_validation_images),
            processes=Processes(rank=0, count=1, device=self.device),
            precision=config.precision,
            on_batch=lambda num_images: self.stop_if_asked(),
        )
        set_training(state.autoencoder)
        self.journal.write("validation", step=state.step, **figures)
        self._draw_scalars("validation", figures)
        _draw(pictures, config.out / VALIDATION / f"step_{state.step:06d}.png")
        return figures

    def finish(self, base_fingerprint: str) -> dict[str, Any]:
        """Measure the latents, export the autoencoder and write the final figures."""
        config, autoencoder = self.config, self.state.exported()
        statistics = self._measure_latents(autoencoder)
        autoencoder.set_latent_statistics(statistics)
        final = self.validate()
        figures = final | {f"before_{name}": value for name, value in self.before.items()}
        card = ModelCard(
            base=config.autoencoder,
            base_fingerprint=base_fingerprint,
            fingerprint=autoencoder.fingerprint(),
            data=config.data,
            num_steps=self.state.step,
            recipe=to_plain(config),
            latent_mean=statistics.mean,
            latent_std=statistics.std,
            figures=figures,
            eqvae_version=installed_version("eqvae") or "unknown",
        )

        def fill(folder: Path) -> None:
            autoencoder.save(folder)
            card.write(folder)

        replace_folder(config.out / AUTOENCODER, fill)
        metrics = figures | {
            "num_steps": self.state.step,
            "training_sec": self.training_sec,
            "training_images_per_sec": self.state.step * config.batch_size / max(self.training_sec, 1e-9),
        }
        write_json(config.out / METRICS, metrics)
        return metrics

    def write_checkpoint(self) -> None:
        """Write all that a resume needs."""
        numbers = {"step": self.state.step, "before": self.before, "training_sec": self.training_sec}
        write_checkpoint(self.config.out / CHECKPOINT, self.state.tensors(), numbers)

    @torch.inference_mode()
    def _measure_latents(self, autoencoder: Autoencoder) -> LatentStatistics:
        """Mean and standard deviation of posterior samples, per channel, over centre-cropped training images."""
        moments = LatentMoments()
        images = self._evaluation_images(self.source, self.config.num_statistics_images)
        for index, x in enumerate(images):
            with autocast(self.device, self.config.precision):
                posterior = autoencoder.encode(x.to(self.device).contiguous(memory_format=torch.channels_last))
            generator = generator_for(self.config.seed, index, 0, 1)  # longer than any training step's key
            noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
            moments.add(posterior.sample(noise).float())
            self.stop_if_asked()
        return moments.statistics()

    def _evaluation_images(self, source: ImageSource, num_images: int) -> Iterator[torch.Tensor]:
        for batch in evaluation_batches(
            source,
            image_size_px=self.config.image_size,
            batch_size=self.config.batch_size,
            num_images=num_images,
            num_workers=0,
            spread=True,
        ):
            self._name_broken(batch)
            yield batch.images

    def _name_broken(self, batch: ImageBatch) -> None:
        for name in set(batch.broken) - self.named:
            self.journal.write("broken_image", step=self.state.step, name=name)
        self.named |= set(batch.broken)


def _draw(pictures: Pictures, path: Path) -> None:
    """Draw x, D(E(tau o x)) and D(tau o E(x)) for the first pictured transform: Figure 2, row by row."""
    small = pictures.decoded_transformed[0].shape[-2:]
    x = torch.nn.functional.interpolate(pictures.images / 255.0, size=small, mode="area")
    rows = torch.cat([x, pictures.encoded_transformed[0] / 255.0, pictures.decoded_transformed[0] / 255.0])
    write_atomically(path, lambda temporary: save_image(rows, temporary, nrow=len(x), format="png"))


def _validation_line(step: int, figures: dict[str, float | int]) -> str:
    line = (
        f"step {step}: equivariance error {figures['equivariance_error_rotation']:.3f} (rotation), "
        f"{figures['equivariance_error_scale']:.3f} (scale), PSNR {figures['psnr_db']:.2f} dB"
    )
    if "codebook_usage" in figures:
        line += f", {100 * figures['codebook_usage']:.1f}% of the codes used"
    return line


def _open_board(config: FinetuneConfig, step: int) -> contextlib.AbstractContextManager[Any]:
    """TensorBoard's writer where it is asked for, else None."""
    if not config.tensorboard:
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(config.out / "tensorboard", purge_step=step + 1)
