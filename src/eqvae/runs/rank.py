"""`eqvae rank`: which autoencoder's, or method's, latents a generator learns best, and which measures would tell."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize, square_px
from eqvae.methods import normal_form
from eqvae.paper.arms import Arm, by_method, distance_key, equalized, evaluations, method_text, redrawn
from eqvae.paper.cells import arm_cell, gfid_cell, runs_of
from eqvae.paper.costs import on_meta
from eqvae.paper.execution import carry_out
from eqvae.paper.plan import Plan, PlannedAutoencoder, PlannedRun
from eqvae.paper.ranking import NONE, PLAIN, RANKING, Contestant, write_ranking
from eqvae.paper.setting import Family, ScaleName, Setting
from eqvae.paper.settings import SETTINGS
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.reproduce import PlanConfig, describe, make_setting, split_name


@dataclass(frozen=True, kw_only=True)
class RankConfig(PlanConfig):
    """Rank autoencoders, or methods of fine-tuning one, by how well a small generator learns their latents."""

    autoencoders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]AUTOENCODER ...")]
    """Two or more presets, hub ids or paths, all continuous or all discrete; with --method one, the base."""

    out: Path
    """Root of the runs, resumed when called again; `ranking.md` and `ranking.json` are written there."""

    scale: ScaleName = "small"
    """`small`: a 4M generator on photographs of 128 px, 64,000 images. `paper`: DiT-B, 400,000 steps, ImageNet. `tiny`:
    as `small` on CIFAR-10 at 64 px, 19,200 images."""

    method: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="METHOD")] = ()
    """Fine-tune the base with this method or mixture, as `finetune --method` has it, and rank the results beside the
    base (`none`) and Equation 1 (`plain`); may be given repeatedly."""

    finetune_steps: int | None = None
    """Of each method before its decoder is polished; None: the scale's."""

    equalize: bool = False
    """Compare methods at equal reconstruction too: decoders go on alone until PSNR is the base's."""

    equalize_chunks: int = 5
    """At most so many times the steps of one of the scale's epochs, after each of which PSNR is looked at."""

    generator: Literal["dit", "sit"] = "dit"
    """What is trained on continuous latents; on tokens it is a MaskGIT."""

    image_size: int | None = None
    """Side of all images, in px; None: 128 for `small`, 64 for `tiny`, 256 for `paper`."""

    max_steps: int | None = None
    """Of each generator; None: the scale's."""


_OF_METHODS = ("finetune_steps", "equalize", "equalize_chunks", "finetune_data", "autoencoder_seeds")
"""What says nothing where nothing is fine-tuned."""


def command(config: RankConfig) -> str | None:
    """Rank, or go on with it, and show the ranking; with --dry-run list the runs."""
    if config.dry_run:
        setting, contestants = make_contestants(config)
        return describe(config, setting, {RANKING: _runs(contestants)})
    path = rank(config)
    return None if path is None else path.read_text().rstrip("\n")


def rank(config: RankConfig, settings: Mapping[ScaleName, Setting] = SETTINGS) -> Path | None:
    """Do what is left of the runs, and write the ranking; returns its page, in all processes but the first None."""
    setting, contestants = make_contestants(config, settings)

    def write(finished: PlannedRun | None = None) -> None:
        write_ranking(contestants, config.out, metric=distance_key(setting), scale=setting.name)

    if not carry_out(Plan.of(_runs(contestants)), config, "rank", write):
        return None
    write()
    return config.out / f"{RANKING}.md"


def _runs(contestants: tuple[Contestant, ...]) -> tuple[PlannedRun, ...]:
    """Evaluations first, then each contestant's first seed, and so on: something can be compared early."""
    equal = [each.equal for each in contestants if each.equal is not None]
    groups = ([each.cells[place] for each in group] for group in (contestants, equal) for place in (0, 1))
    first, generators, *others = groups
    return (*runs_of([*first, *generators]), *(run for cells in others for run in runs_of(cells)))


def make_contestants(
    config: RankConfig, settings: Mapping[ScaleName, Setting] = SETTINGS
) -> tuple[Setting, tuple[Contestant, ...]]:
    """Plan what each autoencoder, or each method, has to go through."""
    names = [split_name(given)[0] for given in config.autoencoders]
    if config.method and len(names) != 1:
        raise UserError(f"--method ranks methods of one base, and {len(names)} are named", "Name one autoencoder")
    if not config.method and len(names) < 2:
        raise UserError("a ranking needs two autoencoders or more", "Name them: eqvae rank AUTOENCODER AUTOENCODER ...")
    given = [flag for flag in _OF_METHODS if getattr(config, flag) != getattr(RankConfig, flag)]
    if given and not config.method:
        raise UserError(f"--{given[0].replace('_', '-')} is of methods, and no --method is given", "Leave it out")
    if "equalize_chunks" in given and not config.equalize:
        raise UserError("--equalize-chunks is of --equalize", "Give both, or leave it out")
    if config.max_steps is not None and config.max_steps < 1:
        raise UserError(f"--max-steps is {config.max_steps}", "It must be at least 1")
    setting = make_setting(config, config.autoencoders, settings)
    if config.image_size is not None:
        setting = setting.with_all("image_size", config.image_size)
    bases = [setting.base(name) for name in names]
    if len({base.is_discrete for base in bases}) > 1:
        listed = ", ".join(base.name for base in bases if base.is_discrete)
        raise UserError(f"some autoencoders are discrete ({listed}), others not", "Rank each kind by itself")
    for base in bases:
        own = base.architecture  # a preset's has colours
        if isinstance(own, Autoencoder) and own.image_channels != 3:
            raise UserError(
                f"'{base.name}' has images of {own.image_channels} channels, and a ranking's reference has colours",
                "Rank autoencoders of colours; finetune, encode, train, sample and score take any channels",
            )
    family: Family = "maskgit" if bases[0].is_discrete else config.generator
    if config.method:
        return setting, tuple(_of_methods(config, setting, bases[0], family))
    return setting, tuple(_contestant(config, setting, base.name, base, family) for base in bases)


def _of_methods(config: RankConfig, setting: Setting, base: PlannedAutoencoder, family: Family) -> Iterator[Contestant]:
    """The base, Equation 1, and each method: same data, steps, batch and seeds."""
    for flag in ("finetune_steps", "equalize_chunks"):
        value = getattr(config, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}", "It must be at least 1")
    chunk_steps = setting.steps_per_epoch if config.equalize else None
    if config.finetune_steps is not None:
        warmup = setting.finetuning.training.adversarial.discriminator_warmup_steps or 0
        if config.finetune_steps <= warmup:
            raise UserError(
                f"--finetune-steps {config.finetune_steps} leaves no step after the {warmup} in which the "
                f"discriminator of --scale {setting.name} warms up",
                f"It must be at least {warmup + 1}",
            )
        setting = replace(setting, epochs=1, steps_per_epoch=config.finetune_steps)
    yield _contestant(config, setting, NONE, base, family, chunk_steps=chunk_steps)
    known: dict[str, str] = {}
    texts = map(normal_form, config.method)
    for text in dict.fromkeys([PLAIN, *texts]):
        autoencoder = by_method(setting, base.name, text)
        assert autoencoder.run is not None
        tuning = autoencoder.run.config
        assert isinstance(tuning, FinetuneConfig)
        tuning.training.check_autoencoder(
            on_meta(base.architecture), image_size=ImageSize.of(square_px(tuning.image_size))
        )
        resolved = method_text(tuning)
        if resolved in known:
            raise UserError(f"--method '{text}' and '{known[resolved]}' are the same ({resolved})", "Leave out one")
        known[resolved] = text
        yield _contestant(config, setting, text, autoencoder, family, method=resolved, chunk_steps=chunk_steps)


def _contestant(
    config: RankConfig,
    setting: Setting,
    name: str,
    autoencoder: PlannedAutoencoder,
    family: Family,
    *,
    method: str | None = None,
    chunk_steps: int | None = None,
) -> Contestant:
    arm = Arm(setting=setting, family=family, size="b", autoencoder=autoencoder, max_steps=config.max_steps)
    equal = None
    if chunk_steps is not None:
        decoder = autoencoder
        if autoencoder.run is not None:
            decoder = equalized(setting, autoencoder, chunk_steps=chunk_steps, max_chunks=config.equalize_chunks)
        equal = Contestant(
            name=name,
            method=method,
            distance=arm_cell(arm, redrawn(arm, decoder), distance_key(setting)),
            evaluations=evaluations(setting, decoder),
            decoders=tuple(run for each in decoder.all_seeds for run in each.needs),
        )
    return Contestant(
        name=name, method=method, distance=gfid_cell(arm), evaluations=evaluations(setting, autoencoder), equal=equal
    )
