"""The configuration of a generator's training, whose fields are the flags of `eqvae train`, and what it asks for."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from tyro.conf import AvoidSubcommands, OmitArgPrefixes, Positional, arg

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.alignment import AdaptationConfig
from eqvae.generators.checkpoints import GeneratorCard
from eqvae.generators.diffusion import DitConfig
from eqvae.generators.families import PARTS, find_recipe
from eqvae.generators.gat import GatConfig, GatObjective
from eqvae.generators.interpolant import SitConfig
from eqvae.generators.maskgit import MaskgitConfig
from eqvae.generators.protocol import LatentSpecification, Objective, ReadingConfig
from eqvae.generators.recipes import BackboneConfig, Recipe
from eqvae.generators.repa import TEACHER_TOKENS, RepaConfig
from eqvae.generators.transformer import TransformerConfig
from eqvae.latents.batches import training_batches
from eqvae.latents.cache import MEASURED, LatentCache, no_mirrored
from eqvae.latents.teaching import TeacherTokens, teach
from eqvae.runtime.device import Precision
from eqvae.runtime.journal import installed_version, say
from eqvae.runtime.processes import Processes
from eqvae.runtime.run_folder import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_ranges
from eqvae.sampling.config import Sampler
from eqvae.training.checkpoints import check_kept
from eqvae.training.generator_step import TrainingBatch

_MODELLED = {"moments": "latents", "tokens": "tokens"}

Batches = Callable[[int, int], Generator[TrainingBatch, None, None]]
"""From the first step and the number of steps to this process's batches, without the objective's draws."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a generator on a latent cache: DiT, SiT, SiT with REPA, or GAT; MaskGIT on one of tokens."""

    recipe: Annotated[str, Positional, arg(metavar="RECIPE")]
    """`dit-{ti,s,b,l,xl}-{1,2,4,8}`, `sit-...`, `repa-sit-...` or `gat-...`: objective, size and patch size; for tokens
    `maskgit-{ti,s,b,l,h}`."""

    latents: Path
    """The latent cache that `eqvae encode` wrote."""

    init: Path | None = None
    """Begin from this RUN's averaged weights, of `eqvae train` or `eqvae convert`, with a new optimizer."""

    adaptation: Annotated[AdaptationConfig, OmitArgPrefixes] = field(default_factory=AdaptationConfig)

    out: Path
    """Output folder; the same command run again resumes what lies there."""

    max_steps: int = 400_000
    """Optimizer steps; 400,000 in most of the paper's tables. More than a finished run has taken lengthen it."""

    batch_size: int = 256
    """Latents per optimizer step, over all processes."""

    gradient_accumulation_steps: int = 1
    """Parts into which a process's share of the batch is split to save memory; changes no result."""

    learning_rate: float | None = None
    """Of AdamW, constant after its warm-up; None: for GAT 2e-4 times 768 over its width, else 1e-4, as published."""

    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; None: 2,500 for MaskGIT, else 0, as published."""

    adam_beta1: float | None = None
    """None: 0 for GAT, else 0.9, as published."""

    adam_beta2: float | None = None
    """None: 0.96 for MaskGIT, 0.99 for GAT, else 0.999, as published."""

    weight_decay: float | None = None
    """Decoupled weight decay; None: 1e-5 for MaskGIT, else 0, as published."""

    max_grad_norm: float | None = None
    """Largest norm of the gradient; 0 does not clip; None: 1 for REPA, GAT and MaskGIT, else 0, as published."""

    ema_decay: float | None = None
    """Decay of the averaged weights, which are sampled from; None: 0.999 for GAT, else 0.9999, as published."""

    posthoc_ema: bool = False
    """Also keep two power-function averages, from which any horizon can be chosen afterwards (arXiv:2312.02696)."""

    label_dropout: float | None = None
    """Probability of training without the label, for classifier-free guidance; None: 0.1, and none for GAT."""

    flip: bool = True
    """Mirror half of the images, where the cache has mirror images."""

    # What some families have and others don't. The command line takes all of these flags, since it knows them before it
    # has read the recipe; `resolved` keeps what is the recipe's, refuses what would change nothing, and leaves None.
    reading: Annotated[ReadingConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=ReadingConfig)
    """All generators of latents."""

    dit: Annotated[DitConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=DitConfig)
    """DiT, and SiT and REPA, which are the same network."""

    sit: Annotated[SitConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=SitConfig)
    """SiT, and REPA on it."""

    repa: Annotated[RepaConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=RepaConfig)
    """REPA."""

    gat: Annotated[GatConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=GatConfig)
    """GAT."""

    maskgit: Annotated[MaskgitConfig | None, OmitArgPrefixes, AvoidSubcommands] = field(default_factory=MaskgitConfig)
    """MaskGIT."""

    autoencoder: str | None = None
    """The decoder of samples, where it was trained further or has moved; its encoder must be the cache's."""

    sample_every: int | None = None
    """Steps between contact sheets and measurements; None: a tenth of max_steps."""

    reference_image_column: str | None = None
    """Of a reference that is a table or an archive: the column or ending that holds the images; None: the usual one."""

    reference: str | None = None
    """DATA, an ADM batch or saved statistics that samples are measured against meanwhile; None: pictures only."""

    features: str = "efficientnet-lite0"
    """Features of that measure: `inception` (FID), `efficientnet-lite0` (offline) or a model of timm."""

    num_watch_samples: int = 1000
    """Samples for each measurement during the run."""

    watch_steps: int | None = None
    """Sampling steps for them, without guidance; None: 8 for MaskGIT, 1 for GAT, which knows no other, else 50."""

    watch_sampler: Sampler | None = None
    """Their sampler, as of `eqvae sample`; None: the published one. In few steps `heun` leaves less noise than SDE."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; one is also written when the run is interrupted. The last two are kept."""

    keep_every: int = 0
    """Keep the checkpoints of multiples of so many steps, in `milestones`; 0 keeps none."""

    keep_last: int = 0
    """Of those, keep the last so many; 0 keeps all."""

    log_every: int = 10
    """Steps between records of the journal."""

    seed: int = 0
    """Of first weights, data order, noise, times and label dropout."""

    precision: Precision = "bf16"
    """Autocast precision of the network; weights stay fp32."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    compile: bool = False
    """Compile the transformer with torch.compile."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""

    shard: bool = False
    """Share weights, gradients, moments and averages out among the processes (FSDP2): for a generator that does not fit
    one device. Changes no result but by rounding, and no file."""

    dry_run: bool = False
    """Print the resolved configuration, sizes, FLOPs and memory, and stop."""

    def resolved(self) -> "TrainConfig":
        """Fill in what follows from other fields and check what can be checked without reading the cache."""
        check_ranges(self, _RANGES)
        check_kept(self.keep_every, self.keep_last)
        recipe = self.find_recipe()
        self._check_adaptation(recipe)
        recipe.check_watch(self.watch_steps, self.watch_sampler)
        if recipe.draws == "pass" and self.shard:
            raise UserError(f"--shard is not for '{recipe}', whose two networks take turns", "Leave it out")
        if self.label_dropout is not None and self.label_dropout > 1:
            raise UserError(f"--label-dropout is {self.label_dropout}", "A probability lies in [0, 1]")
        if self.reference is not None and self.num_watch_samples < 2:
            raise UserError(f"--num-watch-samples is {self.num_watch_samples}", "A distance takes at least 2")
        follows: dict[str, Any] = {part: getattr(recipe, part, None) for part in PARTS.values()}
        follows |= {"watch_sampler": None} if self.watch_sampler == recipe.sampler else {}  # said or not, one measure
        for name, value in recipe.values()._asdict().items():
            follows[name] = value if getattr(self, name) is None else getattr(self, name)
        follows["sample_every"] = self.sample_every or max(self.max_steps // 10, 1)
        return replace(self, recipe=str(recipe), **follows)

    def _check_adaptation(self, recipe: Recipe) -> None:
        """Refuse flags of a start that there is none of."""
        given = [f"--{name.replace('_', '-')}" for name, value in vars(self.adaptation).items() if value is not None]
        if not given:
            return
        if self.init is None:
            raise UserError(f"{given[0]} is for a run that begins from another", "Name that one by --init")
        if recipe.unadaptable:
            raise UserError(f"{given[0]} is not for '{recipe}': {recipe.unadaptable}", "Leave it out")
        if self.adaptation.align_images is not None and self.adaptation.old_latents is None:
            raise UserError("--align-images is of --old-latents", "Name the cache that --init was trained on")
        if self.adaptation.lora_rank is not None and (self.shard or self.posthoc_ema):
            flag = "--shard" if self.shard else "--posthoc-ema"
            raise UserError(f"{flag} is not for --lora-rank", "Leave one of the two out")

    def find_recipe(self) -> Recipe:
        """Read the recipe's name, with what was chosen of its family."""
        return find_recipe(self.recipe, self.reading, self.dit, self.sit, self.repa, self.gat, self.maskgit)


_RANGES = (
    (AT_LEAST_1,
     ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every", "sample_every",
      "num_watch_samples", "repa_depth", "penalty_every", "lora_rank", "align_images")),
    (("in 1 ... 1000", lambda value: 1 <= value <= 1000), ("watch_steps",)),
    (POSITIVE, ("learning_rate",)),
    (NOT_NEGATIVE,
     ("seed", "keep_every", "keep_last", "lr_warmup_steps", "weight_decay", "max_grad_norm", "label_dropout",
      "repa_weight", "r1_weight", "r2_weight", "align_steps")),
    (BELOW_1, ("adam_beta1", "adam_beta2", "ema_decay", "label_smoothing")),
)  # fmt: skip

FREE_TO_CHANGE = frozenset(
    {"out", "max_steps", "device", "log_every", "sample_every", "checkpoint_every", "keep_every", "keep_last",
     "dry_run", "compile", "reference", "reference_image_column", "features", "num_watch_samples", "watch_steps",
     "watch_sampler", "gradient_checkpointing", "gradient_accumulation_steps", "shard", "data", "autoencoder",
     "cache_teacher", "old_latents"}
)  # fmt: skip
"""Fields that may differ between a run and its resumption."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration asks for, resolved against its cache."""

    config: TrainConfig
    recipe: Recipe
    cache: LatentCache
    objective: Objective | GatObjective
    transformer: BackboneConfig
    teacher: TeacherTokens | None

    @property
    def largest_latents(self) -> LatentSpecification:
        """Those that take most memory."""
        largest = max(self.cache.shapes, key=lambda each: each.height * each.width)
        return self.transformer.latents.resized(largest.height, largest.width)

    @property
    def decoder(self) -> str:
        """Where the autoencoder that made the cache is now, or one whose decoder was trained further."""
        return self.config.autoencoder or self.cache.index.autoencoder

    def check_decoder(self, autoencoder: Autoencoder) -> str:
        """Refuse latents of another encoder, and say where the decoder is not the cache's own; returns its digest."""
        index = self.cache.index
        own = autoencoder.check_decodes(
            f"The latents in '{self.cache.folder}' were made by",
            made_by=index.autoencoder,
            fingerprint=index.fingerprint,
            encoder_fingerprint=index.encoder_fingerprint,
        )
        if own != index.fingerprint:
            say(f"decoder: '{autoencoder.name}', trained further than that of '{index.autoencoder}', which encoded")
        return own

    def batches(self, processes: Processes) -> Batches:
        """Bind the cache's reader to the run's processes; a teacher's tokens join the draws."""
        config = self.config

        def batches(first_step: int, num_steps: int) -> Generator[TrainingBatch, None, None]:
            for batch in training_batches(
                self.cache,
                batch_size=config.batch_size,
                seed=config.seed,
                first_step=first_step,
                num_steps=num_steps,
                flip=config.flip,
                sample=config.reading is not None and config.reading.posterior == "sample",
                rank=processes.rank,
                count=processes.count,
            ):
                labels = torch.zeros(len(batch.latents), dtype=torch.int64) if batch.labels is None else batch.labels
                draws: dict[str, Tensor] = {}
                if self.teacher is not None:
                    draws[TEACHER_TOKENS] = self.teacher.tokens(batch.indices, batch.mirrored)
                images = {"indices": batch.indices, "mirrored": batch.mirrored}
                yield TrainingBatch(latents=batch.latents, labels=labels, draws=draws, images=images)

        return batches

    def card(self, decoder_fingerprint: str) -> GeneratorCard:
        """Describe the generator before its first step."""
        index, normalization = self.cache.index, self.cache.normalization
        return GeneratorCard(
            family=self.recipe.family,
            recipe=str(self.recipe),
            transformer=self.transformer,
            interpolant=self.recipe.interpolant,
            shift=tuple(normalization.shift.tolist()),
            scale=tuple(normalization.scale.tolist()),
            autoencoder=self.decoder,
            autoencoder_fingerprint=decoder_fingerprint,
            encoder_fingerprint=index.encoder_fingerprint,
            image_size_px=index.image_size_px,
            class_names=index.class_names,
            num_steps=0,
            eqvae_version=installed_version("eqvae") or "unknown",
            schedule=self.config.maskgit.schedule if self.config.maskgit else None,
            shapes=tuple((each.height, each.width) for each in index.shapes if each.num_images),
            label_dropout=_label_dropout(self.config, self.recipe),
        )


def _label_dropout(config: TrainConfig, recipe: Recipe) -> float:
    return recipe.values().label_dropout if config.label_dropout is None else config.label_dropout


def make_plan(config: TrainConfig, processes: Processes) -> Plan:
    """Open the cache and resolve the recipe against it."""
    recipe = config.find_recipe()
    cache = LatentCache.open(config.latents, normalization=config.reading.normalization if config.reading else MEASURED)
    if recipe.models != cache.index.kind:
        holds = _MODELLED[cache.index.kind]
        raise UserError(f"'{recipe}' models {_MODELLED[recipe.models]}; '{config.latents}' holds {holds}", recipe.mend)
    if config.flip and not cache.index.has_mirrored:
        raise no_mirrored(cache)
    processes.check_batch(config.batch_size, config.gradient_accumulation_steps)
    channels, height, width = cache.latent_shape
    latents = LatentSpecification(
        channels=cache.index.codebook_size or channels, height=height, width=width,
        num_classes=cache.index.num_classes or 0,
    )  # fmt: skip
    shapes = [latents.resized(each.height, each.width) for each in cache.shapes]
    recipe.check_shapes(shapes, str(config.latents), has_teacher=config.repa is not None)
    objective = recipe.objective(latents, label_dropout=_label_dropout(config, recipe))
    transformer, teacher = recipe.transformer(latents), None
    if config.repa is not None:
        teacher = teach(config.repa, cache, transformer.grid, processes)
        transformer = replace(cast(TransformerConfig, transformer), teacher_channels=teacher.channels)
    return Plan(
        config=config, recipe=recipe, cache=cache, objective=objective, transformer=transformer, teacher=teacher
    )
