"""The fine-tuning run: images in, an exported autoencoder with measured latents out."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from eqvae.artifacts import (
    AUTOENCODER,
    CONFIG,
    METRICS,
    ModelCard,
    Pictures,
    claim_output_folder,
    read_json,
    to_plain,
    write_atomically,
    write_json,
)
from eqvae.autoencoders.protocol import Autoencoder, LatentStatistics
from eqvae.finetune.adversarial import MIN_IMAGE_SIZE_PX, Watchdog
from eqvae.finetune.config import FinetuneConfig, check_same_run
from eqvae.finetune.reconstruction import ReconstructionLoss
from eqvae.finetune.step import NotFiniteError, StepRecord, TrainState, build_state, train_step
from eqvae.images import ImageBatch, ImageSource, evaluation_batches, open_images, training_batches
from eqvae.metrics.autoencoder import LatentMoments, check_image_size, evaluate_autoencoder
from eqvae.runtime.checkpoint import read_checkpoint, write_checkpoint
from eqvae.runtime.device import autocast, choose_device, place
from eqvae.runtime.errors import Interrupted, UserError
from eqvae.runtime.journal import Journal, installed_version, write_environment
from eqvae.runtime.progress import Progress
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import stop_on_signals
from eqvae.transforms import TransformSampler

CHECKPOINT = "checkpoint.safetensors"
VALIDATION = "validation"
"""Folder of the pictures of each validation: rows x, D(E(tau o x)), D(tau o E(x))."""


def finetune(config: FinetuneConfig, autoencoder: Autoencoder) -> dict[str, Any]:
    """Fine-tune, or go on where an earlier call with the same configuration stopped.

    Args:
        config: Resolved or not.
        autoencoder: The base, which is trained in place.

    Returns:
        The final figures, as `metrics.json` holds them.

    Raises:
        UserError: If the input is wrong, or the loss became NaN or infinite.
        Interrupted: If a signal stopped the run; its checkpoint is written.
    """
    config = config.resolved()
    device = choose_device(config.device)
    check_image_size(config.image_size, autoencoder.stride, quarters=True)
    if config.adversarial_weight > 0 and config.image_size * (config.min_scale or 1.0) < MIN_IMAGE_SIZE_PX:
        raise UserError(
            f"images of {config.image_size} px scaled by {config.min_scale} are too small for the discriminator",
            f"Use --image-size {4 * MIN_IMAGE_SIZE_PX + 4 * autoencoder.stride} or more, or --adversarial-weight 0",
        )
    source, validation_source = open_images(config.data), open_images(config.validation_data, split="evaluation")
    reconstruction_loss = place(ReconstructionLoss(config.perceptual, config.perceptual_weight), device)
    base_fingerprint = autoencoder.fingerprint()
    identity = to_plain(config) | {"command": "finetune", "base_fingerprint": base_fingerprint}
    saved = claim_output_folder(config.out, "finetune")
    if saved is not None:
        check_same_run(saved, config)
        if saved.get("base_fingerprint") != base_fingerprint:
            raise UserError(
                f"'{config.out}' holds a run that began from other weights than '{config.autoencoder}' has now",
                "Give the same autoencoder to resume it, or another --out",
            )
        if (config.out / METRICS).exists():
            return read_json(config.out / METRICS)

    state = build_state(autoencoder, config, device)
    numbers = _resume(state, config.out / CHECKPOINT, device)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / CONFIG, identity)
    write_environment(config.out, device=device, seed=config.seed)
    run = _Run(
        config=config,
        device=device,
        state=state,
        reconstruction_loss=reconstruction_loss,
        source=source,
        validation_source=validation_source,
        journal=Journal(config.out, keep_up_to_step=state.step),
        sampler=config.sampler(),
        **numbers,
    )
    if state.step == 0:
        run.before = run.validate()
    run.train()
    return run.finish(base_fingerprint)


def _resume(state: TrainState, path: Path, device: torch.device) -> dict[str, Any]:
    """Load the checkpoint where there is one, and return its numbers beside the step."""
    if not path.exists():
        return {}
    tensors, numbers = read_checkpoint(path)
    state.load({name: tensor.to(device) for name, tensor in tensors.items()}, numbers.pop("step"))
    return numbers


@dataclass(kw_only=True)
class _Run:
    """One process's part of a run."""

    config: FinetuneConfig
    device: torch.device
    state: TrainState
    reconstruction_loss: ReconstructionLoss
    source: ImageSource
    validation_source: ImageSource
    journal: Journal
    sampler: TransformSampler
    before: dict[str, float] = field(default_factory=dict)
    """Validation of the base."""
    training_sec: float = 0.0
    """Spent in training steps, over all sessions."""
    step_sec: float = 0.0
    """Spent in the last step."""
    watchdog: Watchdog = field(default_factory=Watchdog)

    def train(self) -> None:
        """Take all steps that are left.

        Raises:
            Interrupted: After a signal; the checkpoint is written.
            UserError: After NaN or infinite losses; the checkpoint of the last good state is written.
        """
        config, state = self.config, self.state
        if config.compile:
            state.autoencoder.encode = torch.compile(state.autoencoder.encode)  # type: ignore[method-assign]
            state.autoencoder.decode = torch.compile(state.autoencoder.decode)  # type: ignore[method-assign]
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
            stop_on_signals() as stop,
            _open_board(config) as board,
            contextlib.closing(batches),
            Progress("finetune", total=config.max_steps, start=state.step) as progress,
        ):
            for batch in batches:
                record = self._step(batch)
                progress.advance(l1=record.l1, loss=record.reconstruction)
                self._log(record, board, progress)
                done = state.step == config.max_steps
                if state.step % (config.validate_every or 1) == 0 and not done:
                    progress.say(_validation_line(state.step, self.validate()))
                if state.step % config.checkpoint_every == 0 or done or stop:
                    self.write_checkpoint()
                if stop and not done:
                    raise Interrupted(
                        f"{stop.signal_name} at step {state.step}; the same command goes on from '{config.out}'"
                    )

    def _step(self, batch: ImageBatch) -> StepRecord:
        """Take one step, or stop the run at its last good state."""
        for name in batch.broken:
            self.journal.write("broken_image", step=self.state.step, name=name)
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

    def _log(self, record: StepRecord, board: Any, progress: Progress) -> None:
        """Write the journal's record where one is due, and what the watchdog says."""
        step = self.state.step
        if step % self.config.log_every == 0:
            figures = asdict(record) | {"images_per_sec": self.config.batch_size / self.step_sec}
            self.journal.write("train", step=step, **figures)
            for name, value in figures.items():
                if board is not None and isinstance(value, float):
                    board.add_scalar(f"train/{name}", value, step)
        if self.state.discriminator is not None and (verdict := self.watchdog.look(record.discriminator)):
            self.journal.write("watchdog", step=step, message=verdict)
            progress.say(f"step {step}: {verdict}")

    def validate(self) -> dict[str, float]:
        """Measure the weights that would be exported, and draw their pictures.

        Returns:
            The figures, which are also in the journal.
        """
        config, state = self.config, self.state
        figures, _, pictures = evaluate_autoencoder(
            state.exported(),
            self._evaluation_images(self.validation_source, config.num_validation_images),
            device=self.device,
            precision=config.precision,
        )
        state.autoencoder.train()
        self.journal.write("validation", step=state.step, **figures)
        _draw(pictures, config.out / VALIDATION / f"step_{state.step:06d}.png")
        return figures

    def finish(self, base_fingerprint: str) -> dict[str, Any]:
        """Measure the latents, export the autoencoder and write the final figures.

        Args:
            base_fingerprint: Digest of the base's weights.

        Returns:
            The final figures.
        """
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
        _export(autoencoder, card, config.out / AUTOENCODER)
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
        return moments.statistics()

    def _evaluation_images(self, source: ImageSource, num_images: int) -> Iterator[torch.Tensor]:
        for batch in evaluation_batches(
            source,
            image_size_px=self.config.image_size,
            batch_size=self.config.batch_size,
            num_images=num_images,
            num_workers=0,
        ):
            yield batch.images


def _export(autoencoder: Autoencoder, card: ModelCard, folder: Path) -> None:
    """Write the model's folder beside its final place and rename it there, so that it is never half-written."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    autoencoder.save(part)
    card.write(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _draw(pictures: Pictures, path: Path) -> None:
    """Draw x, D(E(tau o x)) and D(tau o E(x)) for the first pictured transform: Figure 2, row by row."""
    small = pictures.decoded_transformed[0].shape[-2:]
    x = torch.nn.functional.interpolate(pictures.images / 255.0, size=small, mode="area")
    rows = torch.cat([x, pictures.encoded_transformed[0] / 255.0, pictures.decoded_transformed[0] / 255.0])
    write_atomically(path, lambda temporary: save_image(rows, temporary, nrow=len(x), format="png"))


def _validation_line(step: int, figures: dict[str, float]) -> str:
    return (
        f"step {step}: equivariance error {figures['equivariance_error_rotation']:.3f} (rotation), "
        f"{figures['equivariance_error_scale']:.3f} (scale), PSNR {figures['psnr_db']:.2f} dB"
    )


def _open_board(config: FinetuneConfig) -> contextlib.AbstractContextManager[Any]:
    """TensorBoard's writer where it is asked for, else None."""
    if not config.tensorboard:
        return contextlib.nullcontext()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard", "Run: pip install 'eqvae[tensorboard]'") from None
    return SummaryWriter(config.out / "tensorboard")
