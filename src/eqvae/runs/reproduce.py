"""`eqvae reproduce`: from the names of tables and figures to their runs, and from these to the tables and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from eqvae.autoencoders.presets import PRESETS
from eqvae.errors import UserError, nearest_name
from eqvae.evidence.curves import short_name
from eqvae.images import open_images
from eqvae.images.image_sets import open_reference
from eqvae.images.sources import Split
from eqvae.paper.causes import CAUSES, causes
from eqvae.paper.cells import TableItem
from eqvae.paper.cheaper import COST, cost
from eqvae.paper.costs import DEVICES, describe_plan
from eqvae.paper.execution import carry_out
from eqvae.paper.figures import FIGURES, FigureItem
from eqvae.paper.headline import HEADLINE, HeadlineItem, headline
from eqvae.paper.plan import Plan, PlannedRun, describe_base
from eqvae.paper.results import write_item
from eqvae.paper.setting import ScaleName, Setting
from eqvae.paper.settings import SETTINGS
from eqvae.paper.tables import TABLES
from eqvae.runtime.journal import say_once

ALL = "all"

Item = TableItem | FigureItem | HeadlineItem

OUR_OWN: Mapping[str, Callable[[Setting], Item]] = {CAUSES: causes, HEADLINE: headline, COST: cost}
"""Items that the paper has not; `all` leaves them out."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """On what a plan's runs depend, for a reproduction and for a ranking."""

    out: Path

    scale: ScaleName = "small"

    data: str | None = None
    """DATA of the generators; None: Imagewoof's, ImageNet's or CIFAR-10's training images from the hub."""

    reference_data: str | None = None
    """What samples are measured against: DATA, or ADM's reference batch, which `paper` needs."""

    validation_data: str | None = None
    """DATA that autoencoders are evaluated on; None: `reference_data`, for `paper` ImageNet's validation images."""

    seeds: int | None = None
    """Seeds of each generator; None: 3, for `paper` 1."""

    finetune_data: str | None = None
    """DATA of fine-tuning; None: `data`. `paper` needs OpenImages."""

    autoencoder_seeds: int | None = None
    """Seeds of each fine-tuning, each of which has generators of its own; None: 2 for `small`, else 1."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    cluster: str | None = None
    """Do the runs on a Ray cluster, several at a time: its address, or `auto` for the one of this machine or of
    RAY_ADDRESS, else this machine's GPUs and cores. None: one after the other, in this process."""

    processes_per_run: int = 1
    """On a cluster, processes that share each run, each with a GPU where there are some."""

    device_name: str = "h100"
    """Whose hours --dry-run estimates."""

    dry_run: bool = False
    """Print the runs with their state, FLOPs, hours and disk, and stop. Estimates leave out optimizers, the
    discriminator, reading and writing files, and on disk all but weights, latents and samples: some percent."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(PlanConfig):
    """Reproduce tables and figures of the paper: plan their runs, do or resume them, write what they show."""

    items: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ITEM ...")]
    """`table1` ... `table12`, `figure1` ... `figure8`, or `all` of these. `headline`: all generators' speed-ups against
    the same fine-tuning without tau. `causes`: how much of the gain is scale, spectrum, equivariance. `cost`: errors,
    reconstruction and generators against the time of fine-tuning."""

    out: Path
    """Root of the runs, which later commands share; each ITEM becomes ITEM.md and ITEM.json in it."""

    scale: ScaleName = "small"
    """`small`: photographs of 128 px and TAESD, a table in hours of two CPU cores. `paper`: ImageNet, as the paper did.
    `tiny`: CIFAR-10 at 64 px, a table in an hour; most of the paper's effects are too small to be seen there."""

    curve_images: int | None = None
    """`small`: images that DiT, SiT and REPA see for their learning curves (Tables 2, 9 and 10, `headline`), with
    repetitions; None: 409,600. More lengthen what is there; 204,800 measure all rows of Tables 9 and 10."""

    autoencoder: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="[NAME=]AUTOENCODER")] = ()
    """A further row of Tables 1 and 12, or, with the NAME of a base, where its weights are, or, with that of one of the
    plan's fine-tunings (`taesd+eq`), what was fine-tuned already; may be given repeatedly."""


def command(config: ReproduceConfig) -> str | None:
    """Reproduce and name the pages, or with --dry-run list the runs."""
    if config.dry_run:
        setting, items = _planned(config, SETTINGS)
        return describe(config, setting, {item.item: item.runs for item in items})
    return "\n".join(str(file) for file in reproduce(config) if file.suffix == ".md") or None


def reproduce(config: ReproduceConfig, settings: Mapping[ScaleName, Setting] = SETTINGS) -> list[Path]:
    """Do what is left of the runs, and write the items; returns their files, in all processes but the first none."""
    _, items = _planned(config, settings)
    plan = Plan.of(run for item in items for run in item.runs)

    def write(finished: PlannedRun | None = None) -> list[Path]:
        changed = [item for item in items if finished is None or any(finished.name == run.name for run in item.runs)]
        return [file for item in changed for file in write_item(item, config.out)]

    return write() if carry_out(plan, config, "reproduce", write) else []


def _planned(config: ReproduceConfig, settings: Mapping[ScaleName, Setting]) -> tuple[Setting, tuple[Item, ...]]:
    setting = make_setting(config, config.autoencoder, settings)
    if config.curve_images is not None:
        batch_sizes = [training.batch_size for training in setting.long_training.values()]
        if not batch_sizes:
            raise UserError(f"--curve-images is for --scale small, not {setting.name}", "Leave it out")
        if config.curve_images < (least := max(batch_sizes)):
            raise UserError(f"--curve-images is {config.curve_images}", f"It must be at least a batch, {least}")
        setting = setting.with_curves_of(config.curve_images)
    items = make_items(config.items, setting)
    if given := [name for name in setting.bases if setting.is_fine_tuning(name)]:
        plan = Plan.of(run for item in items for run in item.runs)
        used = {run.name.partition("/")[2] for run in plan.runs}
        if idle := [name for name in given if name not in used]:
            said = f"--autoencoder {idle[0]}=... is no fine-tuning of {', '.join(config.items)}"
            raise UserError(said, "Leave it out")
    return setting, items


def describe(config: PlanConfig, setting: Setting, items: Mapping[str, Sequence[PlannedRun]]) -> str:
    """Work out what a plan would do and cost. Nothing is written, and no default data are opened."""
    if config.device_name not in DEVICES:
        raise UserError(f"--device-name '{config.device_name}' is not known", nearest_name(config.device_name, DEVICES))
    plan = Plan.of(run for runs in items.values() for run in runs)
    plan.check_saved()
    given = {config.data, config.finetune_data, config.validation_data, config.reference_data} - {None}
    if setting.finetuning.data in given:
        open_images(setting.finetuning.data)
    if setting.encoding.data in given:
        setting = replace(setting, num_images=len(open_images(setting.encoding.data)))
    if setting.evaluation.data in given:
        found = len(open_images(setting.evaluation.data, split="evaluation"))
        setting = replace(setting, num_validation_images=found)
    if config.reference_data is not None:
        open_reference(config.reference_data, image_size_px=setting.reference.image_size)
    return describe_plan(plan, items, setting, config.device_name)


def make_setting(
    config: PlanConfig, autoencoders: Sequence[str], settings: Mapping[ScaleName, Setting] = SETTINGS
) -> Setting:
    """Apply the command line to a scale."""
    check_names(autoencoders)
    setting = settings[config.scale]
    if config.seeds is not None:
        if config.seeds < 1:
            raise UserError(f"--seeds is {config.seeds}", "It must be at least 1")
        setting = replace(setting, seeds=tuple(range(config.seeds)))
    if config.autoencoder_seeds is not None:
        if config.autoencoder_seeds < 1:
            raise UserError(f"--autoencoder-seeds is {config.autoencoder_seeds}", "It must be at least 1")
        setting = replace(setting, autoencoder_seeds=tuple(range(config.autoencoder_seeds)))
    setting = setting.with_data(
        data=config.data,
        reference_data=config.reference_data,
        finetune_data=config.finetune_data,
        validation_data=config.validation_data,
    )
    setting = _with_as_many_as_there_are(setting, settings[config.scale])
    for given in autoencoders:
        name, location = split_name(given)
        setting = replace(setting, bases={**setting.bases, name: describe_base(name, location)})
        if setting.is_fine_tuning(name):
            say_once(f"'{name}' is '{location}', and is not fine-tuned here")
        elif name not in (*setting.autoencoders.values(), setting.generator_base, *setting.extra):
            setting = replace(setting, extra=(*setting.extra, name))
    return replace(setting.with_all("device", config.device), root=config.out)


def _with_as_many_as_there_are(setting: Setting, scale: Setting) -> Setting:
    """Take all images of data that the user named where they are fewer than the scale's own; each run says how many."""
    splits: dict[str, Split] = {"encoding": "train", "evaluation": "evaluation"}
    for name, split in splits.items():
        own = getattr(setting, name)
        if own.num_images is None or own.data == getattr(scale, name).data:
            continue
        if (found := len(open_images(own.data, split=split))) < own.num_images:
            counted: dict[str, Any] = {"num_images" if name == "encoding" else "num_validation_images": found}
            setting = replace(setting, **counted | {name: replace(own, num_images=None)})
    return setting


def make_items(names: Sequence[str], setting: Setting) -> tuple[Item, ...]:
    """Look tables and figures up."""
    papers: dict[str, Callable[[Setting], Item]] = {**TABLES, **FIGURES}
    known = papers | {**OUR_OWN}
    wanted: dict[str, None] = {}
    for name in names:
        if name != ALL and name not in known:
            raise UserError(f"there is no item '{name}'", nearest_name(name, [*known, ALL]))
        wanted |= dict.fromkeys(papers if name == ALL else [name])
    if not wanted:
        raise UserError(
            "no item is named",
            f"Name some of table1 ... table12, figure1 ... figure8, {', '.join(OUR_OWN)}, or '{ALL}'",
        )
    return tuple(known[name](setting) for name in wanted)


def check_names(autoencoders: Sequence[str]) -> None:
    """Refuse a name that is given twice: one of the two would be dropped."""
    names = [split_name(given)[0] for given in autoencoders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two autoencoders are called '{twice[0]}'", "Give names: NAME=AUTOENCODER")


def split_name(given: str) -> tuple[str, str]:
    """Read `[NAME=]AUTOENCODER`."""
    name, separator, location = given.partition("=")
    if separator:
        if not name or not location or "/" in name:
            raise UserError(f"--autoencoder '{given}' can't be read", "Write it as NAME=PATH, or only the path")
        return name, location
    return (given if given in PRESETS else short_name(Path(given).resolve())), given
