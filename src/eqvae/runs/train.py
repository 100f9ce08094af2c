"""`eqvae train RECIPE --latents DIR --out DIR`: a generator learns the latents of a cache."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from eqvae.artifacts.files import read_journal, write_json
from eqvae.artifacts.names import METRICS, SNAPSHOTS
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import GeneratorCard, Weights, build_generator, write_generator
from eqvae.generators.gat import GatObjective
from eqvae.generators.gat_transformer import GatGenerator
from eqvae.generators.protocol import Objective
from eqvae.generators.recipes import Backbone
from eqvae.generators.transformer import Transformer
from eqvae.latents.cache import LatentCache
from eqvae.runs.train_config import FREE_TO_CHANGE, Batches, Plan, TrainConfig, make_plan
from eqvae.runs.train_cost import describe_plan, training_flops
from eqvae.runs.train_start import begin_from
from eqvae.runs.train_watch import WATCH_BATCH_SIZE, Reference, SampleWatch, load_reference
from eqvae.runtime.device import choose_device, matrix_peak_flops_per_sec, place
from eqvae.runtime.heap import give_back_at_once
from eqvae.runtime.journal import Journal, say
from eqvae.runtime.memory import TRAIN_FLAGS, told_when_full
from eqvae.runtime.processes import Processes, join_processes
from eqvae.runtime.run_folder import RunFolder
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import StopRequest, stop_on_signals
from eqvae.training.adapters import add_block_adapters, merged_weights
from eqvae.training.adversarial_step import AdversarialState, adversarial_step, build_adversarial_state
from eqvae.training.checkpoints import check_not_beyond, has_checkpoint
from eqvae.training.generator_step import GeneratorState, TrainingBatch, TrainState, build_state, train_step
from eqvae.training.loop import Loop, Schedule
from eqvae.training.sharding import shard, whole

_DRAWS, _WEIGHTS, _OPPOSED_WEIGHTS = 1, 2, 3  # what a random stream is for


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
    identity = _check_latents(folder, config, plan.cache)
    done = folder.figures_after(config.max_steps)
    if done is not None:
        return done if processes.is_first else None
    check_not_beyond(config.out, max_steps=config.max_steps)
    autoencoder = load_autoencoder(plan.decoder)
    decoder_fingerprint = plan.check_decoder(autoencoder)
    if folder.saved is not None and folder.saved.get("decoder_fingerprint", fingerprint) != decoder_fingerprint:
        raise UserError(
            f"'{config.out}' drew its samples with another decoder than '{plan.decoder}' has now",
            "Give the same --autoencoder to resume it, or another --out",
        )
    _check_memory(plan, autoencoder, processes)
    reference = load_reference(config, plan.cache.index, processes)
    if reference is not None:
        _check_measure(folder, config, reference)
    card = plan.card(decoder_fingerprint)
    transformer = plan.transformer.build(generator=generator_for(config.seed, _WEIGHTS))
    alignment = dict[str, float]()
    if config.init is not None and not has_checkpoint(config.out):
        alignment = begin_from(config.init, transformer, plan)
    if plan.teacher is not None:  # all has been checked: its tokens may take hours
        plan = replace(plan, teacher=plan.teacher.read(processes))
    if config.shard:
        shard(transformer, processes, config.precision)
    state = first_state(transformer, plan, processes.device)
    if decoder_fingerprint != fingerprint:  # trained further than the latents' own
        identity["decoder_fingerprint"] = decoder_fingerprint
    if reference is not None:
        identity |= reference.identity
    with (
        # Figures of a run that is made longer are not figures of this one.
        folder.hold(config, processes, seed=config.seed, anew=(METRICS,), **identity),
        stop_on_signals() as stop,
    ):
        found = {"reference": reference.found if reference is not None else None, "alignment": alignment}
        run = Run(
            config=config,
            processes=processes,
            state=state,
            objective=plan.objective,
            card=card,
            batches=plan.batches(processes),
            watch=SampleWatch(
                config=config,
                generator=lambda: build_generator(
                    card, merged_weights(whole(state.average.weights())), source="the averaged weights"
                ),
                autoencoder=place(autoencoder, processes.device),
                reference=reference,
                processes=processes,
            ),
            stop=stop,
            found={kind: record for kind, record in found.items() if record},
        )
        with told_when_full(TRAIN_FLAGS):
            figures = run.train()
    return figures if processes.is_first else None


def _check_memory(plan: Plan, autoencoder: Autoencoder, processes: Processes) -> None:
    """Refuse a run that does not fit, before anything is written."""
    from eqvae.runs.memory import is_beyond_doubt, training_memory  # its file takes this one's steps

    config, stride = plan.config, plan.cache.index.stride
    image_px = plan.largest_latents.height * plan.largest_latents.width * stride**2
    with torch.device("meta"):
        num_parameters = plan.transformer.build().num_parameters() + autoencoder.num_parameters()
    num_kept = config.batch_size // (processes.count * config.gradient_accumulation_steps)
    if not is_beyond_doubt(num_parameters, image_px * (num_kept + WATCH_BATCH_SIZE / 8), processes.device):
        memory = training_memory(plan, autoencoder, processes)
        memory.check_fits(processes.device, TRAIN_FLAGS, num_processes=processes.count)


def _check_latents(folder: RunFolder, config: TrainConfig, cache: LatentCache) -> dict[str, str]:
    """Refuse to go on with other latents; returns what `config.json` knows them by."""
    index = cache.index
    autoencoder = {"latents_fingerprint": index.fingerprint}
    images = {"latents_data": f"{index.num_images} images {index.data_fingerprint}"}
    encoding = {"latents_digest": cache.digest}
    others = {
        "another autoencoder": folder.differs(**autoencoder),
        "other images": folder.contradicts(**images),
        "another encoding": folder.contradicts(**encoding),  # in another size, precision or order, say
    }
    if other := next((name for name, is_other in others.items() if is_other), None):
        raise UserError(
            f"'{config.out}' holds a run on latents of {other} than '{config.latents}' has now",
            "Give the same latents to resume it, or another --out",
        )
    return autoencoder | images | encoding


def _check_measure(folder: RunFolder, config: TrainConfig, reference: Reference) -> None:
    """Refuse to go on with another measure of the samples: a curve is of one."""
    if folder.saved is None or not any("num_samples" in record for record in read_journal(config.out)):
        return
    folder.check_same(config, FREE_TO_CHANGE - {"features", "num_watch_samples", "watch_steps", "watch_sampler"})
    if folder.contradicts(**reference.identity):
        raise UserError(
            f"'{config.out}' measured its samples against other images than those of '{config.reference}'",
            "Give the same --reference, or another --out",
        )
    if "reference_moments" not in folder.saved and reference.takes_moments_of_a_batch:
        say(
            f"earlier distances in '{config.out}' are to the images of '{config.reference}', from now on to its moments"
        )


def first_state(transformer: Backbone, plan: Plan, device: torch.device) -> GeneratorState:
    """Set up training from first weights; a discriminator's, and adapters', are drawn here."""
    config, objective, adaptation = plan.config, plan.objective, plan.config.adaptation
    if isinstance(objective, GatObjective):
        assert isinstance(transformer, GatGenerator)  # its family has no other
        weights = generator_for(config.seed, _OPPOSED_WEIGHTS)
        discriminator = transformer.config.build_discriminator(generator=weights)
        return build_adversarial_state(transformer, discriminator, objective, config, device)
    if adaptation.lora_rank is not None:
        assert isinstance(transformer, Transformer)  # others were refused
        add_block_adapters(transformer, adaptation.lora_rank, seed=config.seed)
    return build_state(transformer, objective, config, device, align_steps=adaptation.align_steps or 0)


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
    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Records for the journal of what was found before the first step."""
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
                checkpoint_every=config.checkpoint_every, keep_every=config.keep_every, keep_last=config.keep_last,
                watch_every=config.sample_every or 1, watch_last=True,
            ),
            state=self.state,
            batches=self.batches,
            take_step=self._step,
            describe=lambda batch: batch.described() | {"generator_key": [config.seed, self.state.step, _DRAWS]},
            watch=self._watch,
            stop=self.stop,
            shown={"loss": "loss", "images_per_sec": "images_per_sec"},
            mend="Start again in another --out with a lower --learning-rate, or a lower --max-grad-norm that is not 0",
        )  # fmt: skip

    def train(self) -> dict[str, Any]:
        """Go on from the checkpoint where there is one, take all steps that are left, and write the final figures."""
        config, state, loop = self.config, self.state, self.loop
        loop.resume()
        if self.processes.is_first:
            loop.journal = Journal(config.out, keep_up_to_step=state.step)
            for kind, record in self.found.items():
                loop.journal.write(kind, **record)
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
        if self.config.gradient_checkpointing and self.processes.device.type == "cpu":
            give_back_at_once()  # else the heap keeps half of what was saved in holes (docs/scale.md)
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
        latents = self.card.transformer.latents.resized(*batch.latents.shape[-2:])
        draws = self.objective.draw(
            self.config.batch_size, latents, generator_for(self.config.seed, state.step, _DRAWS)
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
            "ema": merged_weights(whole(self.state.average.weights(), everywhere=False)),
            "model": merged_weights(whole(self.state.transformer.state_dict(), everywhere=False)),
        }
        if is_first:
            write_generator(self.config.out, replace(self.card, num_steps=step), weights)
        if self.state.power_averages is not None:
            self.state.power_averages.write_snapshots(self.config.out / SNAPSHOTS, is_first=is_first)
        self.processes.wait()
        return self.watch(step)
