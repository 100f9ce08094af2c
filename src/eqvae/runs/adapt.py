"""`eqvae adapt RUN --latents NEW --out DIR`: a trained generator goes on with another autoencoder's latents.

It is `eqvae train --init RUN --old-latents OLD --align-steps ...` with RUN's own recipe and settings, and the folder is
one of `eqvae train`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from eqvae.artifacts.files import read_json
from eqvae.artifacts.names import CONFIG
from eqvae.artifacts.typed import to_type
from eqvae.errors import UserError
from eqvae.generators.checkpoints import read_card
from eqvae.generators.families import PATCH_SIZES
from eqvae.generators.transformer import TransformerConfig
from eqvae.latents.cache import MEASURED, LatentCache
from eqvae.runs import train as training
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import Precision
from eqvae.runtime.journal import say_once
from eqvae.runtime.run_folder import flat_fields, from_flat
from eqvae.sampling.config import Sampler

_KEPT = (
    "batch_size", "gradient_accumulation_steps", "learning_rate", "lr_warmup_steps", "adam_beta1", "adam_beta2",
    "weight_decay", "max_grad_norm", "ema_decay", "label_dropout", "flip", "posterior", "loss_weight", "teacher",
    "teacher_weights", "repa_weight", "repa_depth", "data", "gradient_checkpointing", "precision",
    "latents",
)  # fmt: skip
"""Settings of RUN that it goes on with; its latents are the old ones then."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Move a trained DiT, SiT or REPA to the latents of another autoencoder: align its ends, then train on."""

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of `eqvae train` or `eqvae convert`. What is not given here is as it was in that training, but for
    --shard, --compile, --cache-teacher, --posthoc-ema and milestones, which this command has not."""

    latents: Path
    """The latent cache of the new autoencoder; of the same images as the old one as far as both go."""

    out: Path
    """Output folder, as that of `eqvae train`; the same command run again resumes what lies there."""

    old_latents: Path | None = None
    """The cache that RUN was trained on; None: where it was then."""

    max_steps: int = 10_000
    """Optimizer steps, those of the alignment included."""

    align_steps: int = 300
    """The first of them, in which first and last layers alone are trained."""

    align_images: int | None = None
    """Images by whose latents these layers are fitted before the first step; None: 10,000."""

    lora_rank: int | None = None
    """Train adapters of this rank in place of the blocks' weights (extra `lora`); None: train everything."""

    normalization: str = MEASURED
    """Of the new latents: `measured`, or `fixed:0.18215`. RUN's own would not fit them."""

    batch_size: int | None = None
    """Latents per optimizer step, over all processes; None: RUN's."""

    learning_rate: float | None = None
    """None: RUN's."""

    lr_warmup_steps: int | None = None
    """None: RUN's."""

    ema_decay: float | None = None
    """Decay of the averaged weights; None: RUN's, whose horizon may be longer than this training."""

    flip: bool | None = None
    """Mirror half of the images; None: as RUN did."""

    autoencoder: str | None = None
    """The decoder of samples, where it was trained further or has moved; its encoder must be the new cache's."""

    data: str | None = None
    """REPA: the images of the cache, where they are no longer where `eqvae encode` found them."""

    reference: str | None = None
    """DATA, an ADM batch or saved statistics that samples are measured against meanwhile; None: pictures only."""

    reference_image_column: str | None = None
    """Column of its table, or ending of its archive's members, that holds the images; None: the usual one."""

    features: str = "efficientnet-lite0"
    """Features of that measure: `inception` (FID), `efficientnet-lite0` (offline) or a model of timm."""

    num_watch_samples: int = 1000
    """Samples for each measurement during the run."""

    watch_steps: int | None = None
    """Sampling steps for them, without guidance; None: 50."""

    watch_sampler: Sampler | None = None
    """Their sampler, as of `eqvae sample`; None: the published one."""

    sample_every: int | None = None
    """Steps between contact sheets and measurements; None: a tenth of max_steps."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; the last two are kept."""

    log_every: int = 10
    """Steps between records of the journal."""

    seed: int = 0
    """Of data order, noise, times, label dropout and adapters."""

    precision: Precision | None = None
    """Autocast precision of the network; None: RUN's."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    dry_run: bool = False
    """Print the resolved configuration, sizes, FLOPs and memory, and stop."""


def command(config: AdaptConfig) -> str | None:
    """Adapt, or write the plan of it."""
    return training.command(training_config(config))


def adapt(config: AdaptConfig) -> dict[str, Any] | None:
    """Adapt, or go on where an earlier call with the same configuration stopped.

    Args:
        config: Which generator goes on with which latents.

    Returns:
        The figures of `metrics.json`, as `train` returns them; None in all processes but the first.

    Raises:
        UserError: If the input is wrong: caches of other images, another kind of generator.
        Interrupted: If a signal stopped it; the same call goes on.
    """
    return training.train(training_config(config))


def training_config(config: AdaptConfig) -> TrainConfig:
    """Say it as `eqvae train` has it: RUN's recipe and settings, and what was given."""
    if config.align_steps >= config.max_steps:
        say_once(f"all {config.max_steps} steps are --align-steps: only the first and last layers are trained")
    card = read_card(config.run)
    if card.kind.unadaptable:
        raise UserError(f"'{config.run}' can't be adapted: {card.kind.unadaptable}", "Train one on the new latents")
    assert isinstance(card.transformer, TransformerConfig)  # as all the others have
    values = _settings_of(config.run)
    old_latents = config.old_latents or values.get("latents")
    if old_latents is None:
        raise UserError(f"'{config.run}' does not say which latents it was trained on", "Give them as --old-latents")
    if card.interpolant is not None:
        values |= {"path": card.interpolant.path, "prediction": card.interpolant.prediction}
    values |= {"qk_norm": card.transformer.qk_norm, "old_latents": old_latents, "init": config.run}
    values["recipe"] = _fitting_recipe(card.recipe, card.transformer, config.latents)
    values |= {name: value for name, value in vars(config).items() if value is not None and name != "run"}
    return from_flat(TrainConfig, **values)


def _settings_of(run: Path) -> dict[str, Any]:
    """Read the settings that a run was trained with; what `eqvae convert` made has none."""
    saved = read_json(run / CONFIG) if (run / CONFIG).is_file() else {}
    if saved.get("command") != "train":
        return {}
    types = {field.name: field.annotation for field in flat_fields(TrainConfig)}
    try:
        return {name: to_type(types[name], saved[name], where=name) for name in _KEPT if saved.get(name) is not None}
    except ValueError as error:
        raise UserError(f"'{run / CONFIG}' is damaged ({error})", "Write it again") from None


def _fitting_recipe(recipe: str, transformer: TransformerConfig, latents: Path) -> str:
    """Name the recipe whose patches make as many tokens of the new latents as RUN has."""
    height, (rows, _) = LatentCache.open(latents).index.latent_height, transformer.grid
    patch_size = height // rows
    if patch_size not in PATCH_SIZES or height % rows:
        raise UserError(
            f"latents of {height} cells can't be cut into the {rows} rows of tokens that '{recipe}' has",
            f"Its patches have {' or '.join(map(str, PATCH_SIZES))} cells: encode at another --image-size",
        )
    return f"{recipe.rpartition('-')[0]}-{patch_size}"
