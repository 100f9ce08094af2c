"""A fine-tuning run: the loop's step and watch, what is measured at its end, and the export."""

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from eqvae.artifacts.files import replace_folder, write_atomically, write_json
from eqvae.artifacts.names import AUTOENCODER, DISCRIMINATOR, METRICS, TENSORBOARD, VALIDATION
from eqvae.artifacts.records import ModelCard, Pictures
from eqvae.autoencoders.padding import set_padding_mode
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, LatentStatistics
from eqvae.images import BrokenImage, ImageBatch, ImageSource, evaluation_batches, training_batches
from eqvae.images.sizes import Buckets, summarize_buckets
from eqvae.losses.adversarial import Watchdog
from eqvae.losses.discriminator_files import save_discriminator
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.metrics.autoencoder import LatentMoments, evaluate_autoencoder
from eqvae.metrics.measures import predicting_measures
from eqvae.networks.features import FeatureExtractor
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runtime.device import autocast
from eqvae.runtime.journal import Journal, installed_version, say
from eqvae.runtime.processes import Processes
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import StopRequest
from eqvae.training.autoencoder_state import TrainState, set_training
from eqvae.training.autoencoder_step import train_step
from eqvae.training.loop import Loop, Schedule


@dataclass(kw_only=True)
class FinetuneRun:
    """One process's part of a run."""

    config: FinetuneConfig
    processes: Processes
    state: TrainState
    recipe: Mapping[str, Any]
    """The resolved configuration, as the card holds it."""
    reconstruction_loss: ReconstructionLoss
    source: ImageSource
    buckets: Buckets
    validation_source: ImageSource
    features: FeatureExtractor | None
    """Of iFID, where it is watched."""
    stop: StopRequest
    loop: Loop[ImageBatch] = field(init=False)
    journal: Journal = field(init=False)
    watchdog: Watchdog = field(init=False)
    named: set[BrokenImage] = field(default_factory=set)
    """Broken images that this process has named already."""
    board: Any = None
    """TensorBoard's writer, where it is asked for."""

    def __post_init__(self) -> None:
        """Set up the loop."""
        config, training = self.config, self.config.training
        self.watchdog = Watchdog.over(training.adversarial)
        self.loop = Loop(
            title="finetune",
            out=config.out,
            processes=self.processes,
            schedule=Schedule(
                max_steps=training.total_steps, batch_size=training.batch_size, log_every=config.log_every,
                checkpoint_every=config.checkpoint_every, keep_every=config.keep_every, keep_last=config.keep_last,
                watch_every=config.validate_every or 1, watch_last=False,
            ),
            state=self.state,
            batches=self._batches,
            take_step=self._step,
            describe=lambda batch: {"images": [self.source.label(index) for index in batch.indices]},
            watch=self._validate,
            stop=self.stop,
            shown={"l1": "l1", "loss": "reconstruction"},
            mend="Start again in another --out with a lower --learning-rate or --adversarial-weight 0",
            on_record=self._draw_scalars,
            numbers={"before": {}},
        )  # fmt: skip

    def train(self, base_fingerprint: str) -> dict[str, Any]:
        """Measure the base, train, measure and export."""
        config, state, loop = self.config, self.state, self.loop
        # All processes name broken images; the first one has taken back what a killed session wrote before they do.
        kept = Journal(config.out, keep_up_to_step=state.step) if self.processes.is_first else None
        self.processes.wait()
        self.journal, loop.journal = Journal(config.out), kept
        if kept is not None:
            kept.write("data", **self.source.summary(), **summarize_buckets(self.buckets))
            kept.write("validation_data", **self.validation_source.summary())
        with _open_board(config, state.step, self.processes) as self.board:
            if state.step == 0:
                loop.numbers["before"] = loop.look()
            for model in (state.autoencoder, state.averaged):
                if model is not None and config.padding_mode is not None:  # the base is measured as it was
                    set_padding_mode(model, config.padding_mode)
            if config.compile:
                decode = "decode_quantized" if isinstance(state.autoencoder, DiscreteAutoencoder) else "decode"
                for name in ("encode", decode):
                    setattr(state.autoencoder, name, torch.compile(getattr(state.autoencoder, name)))
            loop.train()
            return self._finish(base_fingerprint)

    def _batches(self, first_step: int, num_steps: int) -> Generator[ImageBatch, None, None]:
        config, training = self.config, self.config.training
        return training_batches(
            self.source,
            image_size_px=self.buckets,
            batch_size=training.batch_size,
            seed=training.seed,
            first_step=first_step,
            num_steps=num_steps,
            flip=config.flip,
            rows=training.rows(self.processes.rank, self.processes.count),
            num_workers=config.num_workers,
        )

    def _step(self, batch: ImageBatch) -> dict[str, str | float]:
        """Take one step, and let the watchdog look at it."""
        self._name_broken(batch)
        if self.state.step == self.config.training.max_steps:
            self.state.begin_polish()
        training = self.config.training.at(self.state.step)
        x = batch.images.to(self.processes.device)
        mixture = training.mixture()
        began = self.config.training.began_at(self.state.step)
        record = train_step(self.state, x, training, self.reconstruction_loss, mixture, self.processes, began)
        verdict = None
        if self.state.discriminator is not None:
            verdict = self.watchdog.look(record.discriminator, record.adaptive_weight)
        if verdict and self.processes.is_first:
            self.journal.write("watchdog", step=self.state.step, message=verdict)
            say(f"step {self.state.step}: {verdict}")
        return record.figures()

    def _validate(self, step: int) -> dict[str, float | int]:
        """Measure the weights that would be exported, and draw their pictures."""
        config, processes = self.config, self.processes
        images = self._evaluation_images(self.validation_source, config.num_validation_images)
        measures = predicting_measures(config.watched, self.features, batch_size=config.training.batch_size)
        figures, _, pictures = evaluate_autoencoder(
            self.state.exported(),
            (x for _, x in images),
            processes=processes,
            precision=config.training.precision,
            measures=measures,
            on_batch=lambda num_images: self._stop_if_alone(),
        )
        set_training(self.state.autoencoder)
        if processes.is_first:
            _draw(pictures, config.out / VALIDATION / f"step_{step:06d}.png")
            if 0 < step < config.training.total_steps:
                used = figures.get("codebook_usage")
                codes = "" if used is None else f", {100 * used:.1f}% of the codes used"
                say(f"step {step}: {describe_errors(figures)}{codes}")
        return figures

    def _finish(self, base_fingerprint: str) -> dict[str, Any]:
        """Measure the latents, export the autoencoder and write the final figures."""
        config, autoencoder, loop = self.config, self.state.exported(), self.loop
        statistics = self._measure_latents(autoencoder)
        autoencoder.set_latent_statistics(statistics)
        num_steps = self.state.step
        final = loop.last_figures if loop.watched_step == num_steps else loop.look()
        figures = final | {f"before_{name}": value for name, value in loop.numbers["before"].items()}
        card = ModelCard(
            base=config.autoencoder,
            base_fingerprint=base_fingerprint,
            fingerprint=autoencoder.fingerprint(),
            data=config.data,
            num_steps=num_steps,
            recipe=dict(self.recipe),
            latent_mean=statistics.mean,
            latent_std=statistics.std,
            figures=figures,
            eqvae_version=installed_version("eqvae") or "unknown",
        )

        def fill(folder: Path) -> None:
            autoencoder.save(folder)
            card.write(folder)
            if self.state.discriminator is not None:
                save_discriminator(self.state.discriminator, folder / DISCRIMINATOR)

        metrics = figures | {
            "num_steps": num_steps,
            "training_sec": loop.training_sec,
            "training_device_sec": loop.total_device_sec(),
            "training_images_per_sec": num_steps * config.training.batch_size / max(loop.training_sec, 1e-9),
        }
        if self.processes.is_first:
            replace_folder(config.out / AUTOENCODER, fill)
            write_json(config.out / METRICS, metrics)
        self.processes.wait()
        return metrics

    @torch.inference_mode()
    def _measure_latents(self, autoencoder: Autoencoder) -> LatentStatistics:
        """Mean and standard deviation of posterior samples, per channel, over centre-cropped training images."""
        training, device = self.config.training, self.processes.device
        num_images = min(self.config.num_statistics_images, len(self.source))
        moments = LatentMoments()
        for first, x in self._evaluation_images(self.source, num_images):
            with autocast(device, training.precision):
                posterior = autoencoder.encode(x.to(device).contiguous(memory_format=torch.channels_last))
            # As if a batch were one process's: its rows are this process's, or all of it.
            index, row = divmod(first, training.batch_size)
            num_rows = max(min(training.batch_size, num_images - index * training.batch_size), row + len(x))
            generator = generator_for(training.seed, index, 0, 1)  # longer than any training step's key
            noise = torch.randn((num_rows, *posterior.mean.shape[1:]), generator=generator)[row : row + len(x)]
            moments.add(posterior.sample(noise.to(device)).float())
            self._stop_if_alone()
        return moments.summed_over(self.processes).statistics()

    def _evaluation_images(self, source: ImageSource, num_images: int) -> Iterator[tuple[int, torch.Tensor]]:
        """This process's part of some images, each batch with the place of its first image."""
        size = self.config.training.batch_size // self.processes.count
        part = self.processes.own_part(-(-min(num_images, len(source)) // size))
        batches = evaluation_batches(
            source,
            image_size_px=self.config.validation_size,
            batch_size=size,
            num_images=num_images,
            num_workers=0,
            spread=True,
            part=part,
        )
        for number, batch in enumerate(batches, start=part.start):
            self._name_broken(batch)
            yield number * size, batch.images

    def _stop_if_alone(self) -> None:
        """End after a signal, in the middle of a measurement; several processes end it together first."""
        if self.processes.count == 1 and self.stop:
            self.loop.end_early()

    def _draw_scalars(self, kind: str, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            if self.board is not None and isinstance(value, float):
                self.board.add_scalar(f"{kind}/{name}", value, self.state.step)

    def _name_broken(self, batch: ImageBatch) -> None:
        for image in sorted(set(batch.broken) - self.named):
            self.journal.write("broken_image", step=self.state.step, **image._asdict())
        self.named |= set(batch.broken)


def _draw(pictures: Pictures, path: Path) -> None:
    """Draw x, D(E(tau o x)) and D(tau o E(x)) for the first pictured transform: Figure 2, row by row."""
    small = pictures.decoded_transformed[0].shape[-2:]
    x = torch.nn.functional.interpolate(pictures.images / 255.0, size=small, mode="area")
    rows = torch.cat([x, pictures.encoded_transformed[0] / 255.0, pictures.decoded_transformed[0] / 255.0])
    write_atomically(path, lambda temporary: save_image(rows, temporary, nrow=len(x), format="png"))


def describe_errors(figures: Mapping[str, float]) -> str:
    """Say what a validation comes to."""
    rotation, scale = (figures[f"equivariance_error_{kind}"] for kind in ("rotation", "scale"))
    return f"equivariance error {rotation:.3f} (rotation), {scale:.3f} (scale), PSNR {figures['psnr_db']:.2f} dB"


def _open_board(config: FinetuneConfig, step: int, processes: Processes) -> contextlib.AbstractContextManager[Any]:
    """TensorBoard's writer where it is asked for, else None."""
    if not config.tensorboard or not processes.is_first:
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(config.out / TENSORBOARD, purge_step=step + 1)
