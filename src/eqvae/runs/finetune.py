"""`eqvae finetune AUTOENCODER --data DATA --out DIR`: an autoencoder and images in, an equivariant autoencoder out."""

import copy
import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from eqvae.artifacts.names import METRICS
from eqvae.artifacts.weights import WhichWeights
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.loading import choose_weights
from eqvae.autoencoders.padding import PaddingMode
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError, nearest_name
from eqvae.images import ImageSize, Pixels, RangeConfig, open_images
from eqvae.images.sizes import bucket_sizes, describe_buckets, largest, read_sizes, sort_into_buckets, write_sizes
from eqvae.images.sources import announce_channels
from eqvae.losses.discriminator_files import begin_discriminator
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.metrics.measures import MIN_IMAGES, PREDICTORS
from eqvae.networks.features import FeatureExtractor, features_at_hand, load_features
from eqvae.runtime.device import choose_device, place
from eqvae.runtime.journal import say
from eqvae.runtime.memory import FINETUNE_FLAGS, told_when_full
from eqvae.runtime.processes import join_processes
from eqvae.runtime.run_folder import AT_LEAST_1, NOT_NEGATIVE, RunFolder, check_ranges, flat
from eqvae.runtime.signals import stop_on_signals
from eqvae.training.adapters import add_adapters, trained_parameters
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import build_state
from eqvae.training.checkpoints import check_kept, check_not_beyond


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune an autoencoder with EQ-VAE (Equations 5 and 7 of arXiv:2502.09509)."""

    autoencoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AUTOENCODER")]
    """Preset, hub id or path; `untrained:NAME` trains an architecture from scratch."""

    data: str
    """`photos`, an image folder, `*.parquet`, tar shards or `hf:NAME[/CONFIGURATION][:SPLIT]`."""

    out: Path
    """Output folder; the same command run again resumes what lies there, with any number of processes."""

    weights: WhichWeights | None = None
    """Of a checkpoint that holds both: `ema`, averaged, or `raw`. None: the averaged ones, and one line says so.
    `AUTOENCODER#raw` says the same."""

    image_size: int | str = 256
    """Side of the training crops, in px; `192x256` for height x width; or several, as in `128,192,256`, which take
    turns from batch to batch. Validation has the largest."""

    aspect_buckets: bool = False
    """Cut each image to the nearest of several aspects up to 1:2, with about as many pixels as --image-size squared;
    a batch is of one aspect."""

    flip: bool = True
    """Mirror half of the training crops."""

    padding_mode: PaddingMode | None = None
    """How convolutions pad, from the first step on and in the export: `zeros`, or `reflect` (fewer artefacts at the
    borders of scaled latents). None: as AUTOENCODER does."""

    training: Annotated[AutoencoderTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=AutoencoderTraining)

    image_column: str | None = None
    """Column of a table, or ending of an archive's members (`mask.png`), that holds the images; None: the usual one."""

    value_range: Annotated[RangeConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RangeConfig)

    validation_data: str = "photos"
    """Images for validation; of `photos`, the photographs held out from training."""

    validation_image_column: str | None = None
    """Of the validation data."""

    num_validation_images: int = 32
    """How many of them at most, spread over the data."""

    num_statistics_images: int = 512
    """Training images, spread over the data, on which the exported scaling and shift factors are measured."""

    validate_every: int | None = None
    """Steps between validations; None: a tenth of max_steps."""

    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written when the run is interrupted. The last two are kept."""

    keep_every: int = 0
    """Keep the checkpoints of multiples of so many steps, in `milestones`; 0 keeps none."""

    keep_last: int = 0
    """Of those, keep the last so many; 0 keeps all."""

    watch: str = ""
    """What may predict a generator, in validations: some of `ifid,spectrum,dimension`, separated by commas. Set beside
    each other at one --num-validation-images alone: with few, distances and dimensions are biased."""

    log_every: int = 10
    """Steps between records of the journal."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    compile: bool = False
    """Compile encoder and decoder with torch.compile."""

    tensorboard: bool = False
    """Write losses and validations for TensorBoard too; needs `pip install eqvae[tensorboard]`."""

    num_workers: int = 1
    """Processes that read images ahead; 0 reads in the training process. Changes no result."""

    dry_run: bool = False
    """Print the resolved configuration, sizes, FLOPs and memory, and stop."""

    def resolved(self) -> "FinetuneConfig":
        """Fill in every None and check what can be checked without reading data."""
        check_ranges(self, _RANGES)
        check_kept(self.keep_every, self.keep_last)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs TensorBoard", "Run: pip install 'eqvae[tensorboard]'")
        for name in self.watched:
            if name not in PREDICTORS:
                raise UserError(f"--watch does not know '{name}'", nearest_name(name, PREDICTORS))
        tenth = max(self.training.max_steps // 10, 1)
        return replace(
            self,
            autoencoder=choose_weights(self.autoencoder, self.weights),
            weights=None,
            training=self.training.resolved(),
            image_size=write_sizes(read_sizes(self.image_size)),
            validate_every=tenth if self.validate_every is None else self.validate_every,
        )

    def sizes(self, stride: int) -> list[tuple[ImageSize, ...]]:
        """List the sizes of training crops by buckets; sides of buckets are whole patches of two cells."""
        sizes = read_sizes(self.image_size)
        return bucket_sizes(sizes, aspect_buckets=self.aspect_buckets, unit_px=2 * stride)

    @property
    def validation_size(self) -> ImageSize:
        """That of validation crops: it is the same whatever else the run trains on."""
        return largest(read_sizes(self.image_size))

    @property
    def watched(self) -> tuple[str, ...]:
        """The names in `watch`."""
        return tuple(name.strip() for name in self.watch.split(",")) if self.watch else ()


_RANGES = (
    (AT_LEAST_1,
     ("log_every", "checkpoint_every", "validate_every", "num_validation_images",
      "num_statistics_images")),
    (NOT_NEGATIVE, ("num_workers", "keep_every", "keep_last")),
)  # fmt: skip

FREE_TO_CHANGE = frozenset(
    {"out", "max_steps", "polish_steps", "num_workers", "device", "log_every", "validate_every", "checkpoint_every",
     "keep_every", "keep_last", "tensorboard", "watch", "dry_run", "compile", "num_statistics_images"}
)  # fmt: skip
"""Fields that may differ between a run and its resumption."""

CHOSEN = ("lr_warmup_steps", "discriminator_warmup_steps")
"""Fields that follow from `max_steps` where a run begins, and stay when it is made longer."""


def command(config: FinetuneConfig) -> str | None:
    """Fine-tune, or with `--dry-run` only plan it; returns what the command line prints."""
    if config.dry_run:
        return json.dumps(plan(config), indent=2)
    figures = finetune(config)
    if figures is None:
        return None
    rotation, scale, psnr = (
        f"{figures[f'before_{name}']:.{digits}f} -> {figures[name]:.{digits}f}"
        for name, digits in (("equivariance_error_rotation", 3), ("equivariance_error_scale", 3), ("psnr_db", 2))
    )
    return f"equivariance error: rotation {rotation}, scale {scale}; PSNR {psnr} dB; model in '{config.out}'"


def finetune(config: FinetuneConfig, autoencoder: Autoencoder | None = None) -> dict[str, Any] | None:
    """Fine-tune an autoencoder, or go on where an earlier call with the same configuration stopped.

    Started by torchrun or `accelerate launch`, processes share each batch; the losses are those of one process.

    Args:
        config: What to train, on what, and how.
        autoencoder: The base, trained in place (and left with its adapters by `lora_rank`); None loads
            `config.autoencoder`.

    Returns:
        The figures of `metrics.json`; those of the base begin with `before_`. None in all processes but the first.

    Raises:
        UserError: If the input is wrong (nothing is written then), or training diverged.
        Interrupted: After SIGTERM or SIGINT, with a checkpoint.
    """
    from eqvae.runs.finetune_checks import RECORDED, check_memory, check_origin, check_sizes, read_once  # it reads this
    from eqvae.runs.finetune_run import FinetuneRun  # as this does

    folder = RunFolder.claim(config.out, "finetune")
    config = folder.keep_choices(config, *CHOSEN).resolved()
    training = config.training
    processes = join_processes(choose_device(config.device))
    processes.check_batch(training.batch_size, training.gradient_accumulation_steps)
    source = open_images(config.data, image_column=config.image_column)
    validation_source = open_images(
        config.validation_data, split="evaluation", image_column=config.validation_image_column
    )
    features = _load_watched_features(config, min(len(validation_source), config.num_validation_images))
    autoencoder = load_autoencoder(config.autoencoder) if autoencoder is None else autoencoder
    discriminator = begin_discriminator(training.adversarial, training.seed, autoencoder.image_channels)
    smallest_px = check_sizes(config, autoencoder, discriminator, processes.count)
    pixels = Pixels(channels=autoencoder.image_channels, range=config.value_range)
    source, validation_source = source.read_as(pixels), validation_source.read_as(pixels, "--validation-data")
    buckets = sort_into_buckets(source, config.sizes(autoencoder.stride), processes)
    compared = training.reconstruction
    reconstruction_loss = ReconstructionLoss(compared.perceptual, compared.perceptual_weight)
    base_fingerprint = autoencoder.fingerprint()
    # The decoder alone is trained from its first polishing step on: the steps before it can't become more.
    has_polished = bool((folder.saved or {}).get("polish_steps"))
    folder.check_same(config, FREE_TO_CHANGE - ({"max_steps"} if has_polished else set()))
    identity = check_origin(folder, config, base_fingerprint, discriminator, (source, validation_source))
    check_not_beyond(config.out, max_steps=training.max_steps, polish_steps=training.polish_steps)
    done = folder.figures_after(training.total_steps)
    if done is not None:
        return done if processes.is_first else None
    check_memory(config, autoencoder, discriminator, processes)
    with stop_on_signals() as stop, told_when_full(FINETUNE_FLAGS):
        run = FinetuneRun(
            config=config,
            processes=processes,
            state=build_state(
                autoencoder, training, processes.device, image_size_px=smallest_px, discriminator=discriminator
            ),
            recipe=flat(config) | {name: identity[name] for name in RECORDED if name in identity},
            reconstruction_loss=place(reconstruction_loss, processes.device),
            source=source,
            buckets=buckets,
            validation_source=validation_source,
            features=None if features is None else place(features, processes.device),
            stop=stop,
        )
        read_once(config, source, buckets, validation_source)
        source.announce("DATA", processes, describe_buckets(buckets))
        validation_source.announce("VALIDATION DATA", processes)
        announce_channels(autoencoder.image_channels)
        # Figures of a run that is made longer are not figures of this one.
        with folder.hold(config, processes, seed=training.seed, anew=(METRICS,), **identity):
            run.loop.resume()
            if folder.saved is not None and processes.is_first:
                _tell_new_end(folder.saved["max_steps"], training)
            figures = run.train(base_fingerprint)
    return figures if processes.is_first else None


def _tell_new_end(max_steps: int, training: AutoencoderTraining) -> None:
    """Say how the rate goes on where a run is given another end."""
    if max_steps != training.max_steps and training.optimizer.lr_scheduler == "cosine":
        say(f"--max-steps was {max_steps}: the rate goes on along the cosine of {training.max_steps} steps")


def _load_watched_features(config: FinetuneConfig, num_images: int) -> FeatureExtractor | None:
    """Load the features of iFID where it is watched, and refuse fewer images than the predictors can see."""
    if {"ifid", "dimension"} & {*config.watched} and num_images < MIN_IMAGES:
        raise UserError(
            f"--watch {config.watch} needs {MIN_IMAGES} images or more, and validation has {num_images}",
            "Give more --num-validation-images or --validation-data",
        )
    return load_features(features_at_hand()) if "ifid" in config.watched else None


def plan(config: FinetuneConfig, autoencoder: Autoencoder | None = None) -> dict[str, Any]:
    """Work out sizes, FLOPs and memory on tensors without values: `--dry-run`."""
    from eqvae.runs.finetune_checks import check_sizes  # it reads the configuration
    from eqvae.runs.memory import finetuning_memory  # as this does

    config = config.resolved()
    training = config.training
    autoencoder = load_autoencoder(config.autoencoder) if autoencoder is None else autoencoder
    discriminator = begin_discriminator(training.adversarial, training.seed, autoencoder.image_channels)
    check_sizes(config, autoencoder, discriminator, 1)
    model = copy.deepcopy(autoencoder).to("meta")
    if training.lora_rank:
        add_adapters(model, training.lora_rank, seed=training.seed)
    num_parameters, num_trained = model.num_parameters(), _count_trained(model, training)
    x = torch.empty(1, autoencoder.image_channels, *config.validation_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        z = model.encode(x).mode()
        model.decode(z)
    forward_flops_per_image = counter.get_total_flops()
    return {
        "config": flat(config) | {"mixture": str(training.mixture())},
        "num_parameters": num_parameters,
        "num_trained": num_trained,
        "latent_size": [autoencoder.latent_channels, *z.shape[-2:]],
        "tflops_per_step": 3 * forward_flops_per_image * training.batch_size / 1e12,
        "tflops_total": 3 * forward_flops_per_image * training.batch_size * training.total_steps / 1e12,
        **finetuning_memory(config, autoencoder, discriminator, join_processes(choose_device(config.device))).figures(),
    }


def _count_trained(autoencoder: Autoencoder, training: AutoencoderTraining) -> int:
    """Count the parameters that steps before polishing change."""
    frozen: set[torch.nn.Parameter] = set()
    frozen |= set(autoencoder.encoder_parameters()) if training.freeze_encoder else set()
    frozen |= set(autoencoder.decoder_parameters()) if training.freeze_decoder else set()
    return sum(each.numel() for each in trained_parameters(autoencoder) if each not in frozen)
