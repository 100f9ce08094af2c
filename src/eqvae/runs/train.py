"""`eqvae train RECIPE --latents DIR --out DIR`: a generator learns the latents of a cache."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from eqvae.artifacts.files import write_json
from eqvae.artifacts.names import CONTACT_SHEETS, METRICS, SNAPSHOTS, contact_sheet_name
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import Generator, GeneratorCard, Weights, build_generator, write_generator
from eqvae.generators.gat import GatObjective
from eqvae.generators.gat_transformer import GatGenerator
from eqvae.generators.protocol import Objective
from eqvae.generators.recipes import Backbone
from eqvae.images.image_sets import open_reference
from eqvae.metrics.comparison import kernel_distance
from eqvae.metrics.frechet import FeatureMoments, frechet_distance
from eqvae.metrics.statistics import FeatureStatistics, compute_statistics, holds_statistics
from eqvae.networks.features import FeatureExtractor, load_features, metric_key
from eqvae.runs.train_config import FREE_TO_CHANGE, Batches, Plan, TrainConfig, begin_from, make_plan
from eqvae.runs.train_cost import describe_plan, training_flops
from eqvae.runtime.device import choose_device, matrix_peak_flops_per_sec, place
from eqvae.runtime.journal import Journal
from eqvae.runtime.processes import Processes, join_processes
from eqvae.runtime.run_folder import RunFolder
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import StopRequest, stop_on_signals
from eqvae.sampling.config import SamplerConfig
from eqvae.sampling.draw import Drawer, contact_sheet, sheet_indices
from eqvae.training.adversarial_step import AdversarialState, adversarial_step, build_adversarial_state
from eqvae.training.checkpoints import has_checkpoint
from eqvae.training.generator_step import GeneratorState, TrainingBatch, TrainState, build_state, train_step
from eqvae.training.loop import Loop, Schedule
from eqvae.training.sharding import shard, whole

_DRAWS, _WEIGHTS, _OPPOSED_WEIGHTS = 1, 2, 3  # what a random stream is for

_WATCH_BATCH_SIZE = 50
_WATCH_SUBSETS = 10
"""Of the kernel distance; `eqvae score` takes ten times as many."""


def command(config: TrainConfig) -> str | None:
    """Train, or write the plan of it."""
    if config.dry_run:
        return json.dumps(describe_plan(config), indent=2)
    figures = train(config)
    if figures is None:  # the first of several processes speaks for all
        return None
    distances = "".join(f", {name} {value:.3f}" for name, value in figures.items() if name.startswith(("fid", "fd_")))
    return (
        f"{figures['num_steps']} steps, {figures['training_images_per_sec']:.1f} images/s{distances}; "
        f"generator in '{config.out}'"
    )


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Train, or go on where an earlier call with the same configuration stopped or, with fewer steps, ended."""
    config = config.resolved()
    processes = join_processes(choose_device(config.device))
    if config.shard and processes.count == 1:
        mend = "Start the command by torchrun, or leave --shard out"
        raise UserError("--shard shares weights out among processes, and there is one", mend)
    plan = make_plan(config, processes)
    fingerprint = plan.cache.index.fingerprint
    folder = RunFolder.claim(config.out, "train")
    folder.check_same(config, FREE_TO_CHANGE)
    if folder.differs(latents_fingerprint=fingerprint):
        raise UserError(
            f"'{config.out}' holds a run on latents of another autoencoder than '{config.latents}' has now",
            "Give the same latents to resume it, or another --out",
        )
    done = folder.figures_after(config.max_steps)
    if done is not None:
        return done if processes.is_first else None
    autoencoder = load_autoencoder(plan.decoder)
    plan.check_decoder(autoencoder)
    decoder_fingerprint = autoencoder.fingerprint()
    if "decoder_fingerprint" in (folder.saved or {}) and folder.differs(decoder_fingerprint=decoder_fingerprint):
        raise UserError(
            f"'{config.out}' drew its samples with another decoder than '{plan.decoder}' has now",
            "Give the same --autoencoder to resume it, or another --out",
        )
    reference = load_reference(config, plan.cache.index.image_size_px, processes)
    card = plan.card(decoder_fingerprint)
    transformer = plan.transformer.build(generator=generator_for(config.seed, _WEIGHTS))
    if config.init is not None and not has_checkpoint(config.out):
        begin_from(config.init, transformer, plan)
    if config.shard:
        shard(transformer, processes, config.precision)
    state = first_state(transformer, plan, processes.device)
    identity = {"latents_fingerprint": fingerprint, "decoder_fingerprint": decoder_fingerprint}
    with (
        # Figures of a run that is made longer are not figures of this one.
        folder.hold(config, processes, seed=config.seed, anew=(METRICS,), **identity),
        stop_on_signals() as stop,
    ):
        if processes.is_first and reference is not None and reference.found is not None:
            Journal(config.out).write("reference", **reference.found)
        run = Run(
            config=config,
            processes=processes,
            state=state,
            objective=plan.objective,
            card=card,
            batches=plan.batches(processes),
            watch=SampleWatch(
                config=config,
                generator=lambda: build_generator(card, whole(state.average.weights()), source="the averaged weights"),
                autoencoder=place(autoencoder, processes.device),
                reference=reference,
                processes=processes,
            ),
            stop=stop,
        )
        figures = run.train()
    return figures if processes.is_first else None


def first_state(transformer: Backbone, plan: Plan, device: torch.device) -> GeneratorState:
    """Set up training from first weights; a discriminator's are drawn here."""
    config, objective = plan.config, plan.objective
    if isinstance(objective, GatObjective):
        assert isinstance(transformer, GatGenerator)  # its family has no other
        weights = generator_for(config.seed, _OPPOSED_WEIGHTS)
        discriminator = transformer.config.build_discriminator(generator=weights)
        return build_adversarial_state(transformer, discriminator, objective, config, device)
    return build_state(transformer, objective, config, device)


@dataclass(kw_only=True)
class Run:
    """One process's part of a run."""

    config: TrainConfig
    processes: Processes
    state: GeneratorState
    objective: Objective | GatObjective
    card: GeneratorCard
    batches: Batches
    watch: Callable[[int], dict[str, float | int]]
    """Samples from the exported weights after a step, draws pictures, and measures what it was asked to."""
    stop: StopRequest
    loop: Loop[TrainingBatch] = field(init=False)
    shared: nn.Module | None = field(init=False, default=None)
    """The learner as all processes train it; a discriminator's and its generator's gradients are averaged otherwise."""

    def __post_init__(self) -> None:
        """Set up the loop."""
        config = self.config
        self.loop = Loop(
            title="train",
            out=config.out,
            processes=self.processes,
            schedule=Schedule(
                max_steps=config.max_steps, batch_size=config.batch_size, log_every=config.log_every,
                checkpoint_every=config.checkpoint_every, keep_every=config.keep_every,
                watch_every=config.sample_every or 1, watch_last=True,
            ),
            state=self.state,
            batches=self.batches,
            take_step=self._step,
            describe=lambda batch: batch.described() | {"generator_key": [config.seed, self.state.step, _DRAWS]},
            watch=self._watch,
            stop=self.stop,
            shown={"loss": "loss", "images_per_sec": "images_per_sec"},
            mend="Start again in another --out with a lower --learning-rate, or with --max-grad-norm 1",
        )  # fmt: skip

    def train(self) -> dict[str, Any]:
        """Go on from the checkpoint where there is one, take all steps that are left, and write the final figures."""
        config, state, loop = self.config, self.state, self.loop
        loop.resume()
        loop.journal = Journal(config.out, keep_up_to_step=state.step) if self.processes.is_first else None
        self.shared = self._share()
        if state.step < config.max_steps:
            peak = matrix_peak_flops_per_sec(self.processes.device, config.precision) * self.processes.count
            share_per_rate = training_flops(state.transformer.config, self.objective) / peak
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

    def _share(self) -> nn.Module | None:
        """The learner, compiled where asked for, wrapped where several processes average their gradients."""
        for network in self.state.networks:
            if self.config.gradient_checkpointing:
                network.gradient_checkpointing = True
            if self.config.compile:
                network.compile()  # in place, so that the weights keep their names
        if not isinstance(self.state, TrainState):
            return None
        learner = self.state.learner
        if self.processes.count == 1 or self.config.shard:  # FSDP averages gradients by itself
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
        placed = replace(
            batch,
            latents=batch.latents.to(device, non_blocking=True),
            labels=batch.labels.to(device, non_blocking=True),
            draws={name: value.to(device, non_blocking=True) for name, value in own.items()},
        )
        if isinstance(state, AdversarialState):
            return adversarial_step(state, placed, self.config, self.processes)
        assert isinstance(state, TrainState) and self.shared is not None
        return train_step(state, placed, self.config, self.shared)

    def _watch(self, step: int) -> dict[str, float | int]:
        """Write the weights to sample from, with power-function averages a snapshot of them, and look at samples."""
        is_first = self.processes.is_first
        weights: dict[Weights, Mapping[str, Tensor]] = {
            "ema": whole(self.state.average.weights(), everywhere=False),
            "model": whole(self.state.transformer.state_dict(), everywhere=False),
        }
        if is_first:
            write_generator(self.config.out, replace(self.card, num_steps=step), weights)
        if self.state.power_averages is not None:
            self.state.power_averages.write_snapshots(self.config.out / SNAPSHOTS, is_first=is_first)
        self.processes.wait()
        return self.watch(step)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are measured against, and by which features."""

    extractor: FeatureExtractor

    statistics: FeatureStatistics

    found: dict[str, Any] | None = None
    """Of its images."""


@dataclass(frozen=True, kw_only=True)
class SampleWatch:
    """Draws the same images (seed and indices) after each stretch of training; every process draws its part."""

    config: TrainConfig

    generator: Callable[[], Generator]
    """The averaged weights as they are now."""

    autoencoder: Autoencoder

    reference: Reference | None

    processes: Processes

    def __call__(self, step: int) -> dict[str, float | int]:
        """Draw pictures and measure."""
        generator, config, device = self.generator(), self.config, self.processes.device
        generator.transformer.to(device)
        drawer = Drawer(
            generator=generator,
            autoencoder=self.autoencoder,
            config=SamplerConfig(num_steps=config.watch_steps, seed=config.seed, precision=config.precision),
            device=device,
        )
        if self.processes.is_first:
            shown = sheet_indices(config.num_watch_samples, drawer.num_classes)
            images = torch.cat(list(_drawn(drawer, shown)))
            contact_sheet(
                images, config.out / CONTACT_SHEETS / contact_sheet_name(step), row_names=drawer.row_names(shown)
            )
        if self.reference is None:
            return {}
        return self._distances(drawer, self.reference) | {"num_samples": config.num_watch_samples}

    def _distances(self, drawer: Drawer, reference: Reference) -> dict[str, float | int]:
        """Measure samples: their moments by the Frechet distance, the features themselves by the unbiased kernel's."""
        extractor, statistics, processes = reference.extractor, reference.statistics, self.processes
        moments, own = FeatureMoments(), range(self.config.num_watch_samples)[processes.rank :: processes.count]
        kept: list[Tensor] = []
        for images in _drawn(drawer, own):
            pooled = extractor.extract(images).pooled
            moments.add(pooled)
            kept.append(pooled.cpu())
        moments = moments.summed_over(processes)
        name = extractor.name
        distance = frechet_distance(
            moments.mean.cpu(), moments.covariance.cpu(), statistics.mean.cpu(), statistics.covariance.cpu()
        )
        figures: dict[str, float | int] = {metric_key(name): distance}
        if statistics.pooled is not None:  # an ADM batch may hold moments alone
            samples = _in_order(processes.gather(torch.cat([statistics.pooled[:0], *kept])))
            kernel = kernel_distance(reference=statistics.pooled, samples=samples, num_subsets=_WATCH_SUBSETS)
            figures[metric_key(name, "kid")] = kernel.value
        return figures


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    """Put together what processes drew in turns, so that subsets of it don't depend on their number."""
    rows = torch.empty((sum(map(len, parts)), parts[0].shape[1]))
    for rank, part in enumerate(parts):
        rows[rank :: len(parts)] = part
    return rows


def _drawn(drawer: Drawer, indices: Sequence[int]) -> Iterator[Tensor]:
    for start in range(0, len(indices), _WATCH_BATCH_SIZE):
        yield drawer.images(indices[start : start + _WATCH_BATCH_SIZE])


def load_reference(config: TrainConfig, image_size_px: int, processes: Processes) -> Reference | None:
    """Compute or read the statistics that samples are measured against during the run."""
    if config.reference is None:
        return None
    extractor = place(load_features(config.features), processes.device)
    path, found = Path(config.reference).expanduser(), None
    if holds_statistics(path):
        statistics = FeatureStatistics.load(path)
        if (name := statistics.provenance.features) != extractor.name:
            raise UserError(
                f"--reference '{path}' holds statistics of {name}",
                f"Use --features {name}, or write others with 'eqvae score --save-reference'",
            )
    else:
        images = open_reference(
            config.reference, image_size_px=image_size_px, image_column=config.reference_image_column
        )
        images.announce("REFERENCE", processes)
        found = images.summary()
        statistics = compute_statistics(
            extractor, images, indices=range(len(images)), device=processes.device, processes=processes
        )
    return Reference(extractor=extractor, statistics=statistics, found=found)
