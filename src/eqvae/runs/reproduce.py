"""`eqvae reproduce`: from the names of tables and figures to their runs, and from these to the tables and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvae.artifacts import CONFIG, check_writable, claim_output_folder, read_json, to_plain, write_json
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.presets import PRESETS
from eqvae.errors import UserError, nearest_name
from eqvae.evidence.curves import short_name
from eqvae.images import open_images
from eqvae.images.image_sets import open_reference
from eqvae.paper.execution import execute
from eqvae.paper.figures import FIGURES, PaperFigure
from eqvae.paper.planned import Plan, PlannedRun
from eqvae.paper.reference import ReferenceConfig
from eqvae.paper.results import write_figure, write_table
from eqvae.paper.setting import GIVEN_LATER, Setting, describe_base
from eqvae.paper.settings import SETTINGS
from eqvae.paper.table import Table
from eqvae.paper.tables import TABLES
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runtime.device import choose_device
from eqvae.runtime.journal import write_environment
from eqvae.runtime.processes import join_processes

ALL = "all"

Item = Table | PaperFigure


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Reproduce tables and figures of the paper: plan their runs, do or resume them, write what they show."""

    items: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ITEM ...")]
    """`table1` ... `table12`, `figure1` ... `figure8`, or `all`."""

    out: Path
    """Root of the runs, which later commands share; each ITEM becomes ITEM.md and ITEM.json in it."""

    scale: Literal["tiny", "paper"] = "tiny"
    """`tiny`: CIFAR-10 on two CPU cores. `paper`: ImageNet, as the paper did."""

    data: str | None = None
    """DATA of the generators; None: CIFAR-10's or ImageNet's training images from the hub."""

    reference_data: str | None = None
    """What samples are measured against: DATA, or ADM's reference batch, which `paper` needs."""

    finetune_data: str | None = None
    """DATA of fine-tuning; None: `data` for `tiny`. `paper` needs OpenImages."""

    validation_data: str | None = None
    """DATA that autoencoders are evaluated on; None: `reference_data` for `tiny`, ImageNet's validation images."""

    autoencoder: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="[NAME=]AUTOENCODER")] = ()
    """A further row of Tables 1 and 12, or, with the NAME of a base, where its weights are; may be given repeatedly."""

    seeds: int | None = None
    """Seeds of each generator; None: 3 for `tiny`, 1 for `paper`."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    device_name: str = "h100"
    """Whose hours --dry-run estimates."""

    dry_run: bool = False
    """Print the runs with their state, FLOPs, hours and disk, and stop."""


def make_setting(config: ReproduceConfig, settings: Mapping[str, Setting] = SETTINGS) -> Setting:
    """Apply the command line to a scale."""
    setting = settings[config.scale]
    if config.seeds is not None:
        if config.seeds < 1:
            raise UserError(f"--seeds is {config.seeds}", "It must be at least 1")
        setting = replace(setting, seeds=tuple(range(config.seeds)))
    setting = setting.with_data(
        data=config.data,
        reference_data=config.reference_data,
        finetune_data=config.finetune_data,
        validation_data=config.validation_data,
    )
    for given in config.autoencoder:
        name, location = split_name(given)
        setting = replace(setting, bases={**setting.bases, name: describe_base(name, location)})
        if name not in (*setting.autoencoders.values(), setting.generator_base, *setting.extra):
            setting = replace(setting, extra=(*setting.extra, name))
    return replace(setting.with_device(config.device), root=config.out)


def make_items(names: Sequence[str], setting: Setting) -> tuple[Item, ...]:
    """Look tables and figures up."""
    known: dict[str, Callable[[Setting], Item]] = {**TABLES, **FIGURES}
    wanted: dict[str, None] = {}
    for name in names:
        if name != ALL and name not in known:
            raise UserError(f"there is no item '{name}'", nearest_name(name, [*known, ALL]))
        wanted |= dict.fromkeys(known if name == ALL else [name])
    if not wanted:
        raise UserError("no item is named", f"Name some of table1 ... table12 and figure1 ... figure8, or '{ALL}'")
    return tuple(known[name](setting) for name in wanted)


def reproduce(config: ReproduceConfig, settings: Mapping[str, Setting] = SETTINGS) -> list[Path]:
    """Do what is left of the runs, and write the items."""
    setting = make_setting(config, settings)
    items = make_items(config.items, setting)
    plan = Plan.of(run for item in items for run in item.runs)
    device = choose_device(config.device)
    _check_root(config)
    plan.check_saved()
    check_inputs(plan)
    processes = join_processes(device)
    processes.wait()
    if processes.is_first:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / CONFIG, to_plain(config) | {"command": "reproduce"})
        write_environment(config.out, device=processes.device, seed=None)
        _write(items, config.out)

    def after_each(run: PlannedRun) -> None:
        _write([item for item in items if any(run.name == other.name for other in item.runs)], config.out)

    execute(plan, config.out, processes, after_each=after_each)
    return _write(items, config.out) if processes.is_first else []


def check_inputs(plan: Plan) -> None:
    """Open what the runs that are left will read, so that what is wrong is told before anything is written."""
    made = {str(run.folder) for run in plan.runs}
    checks: dict[tuple[str, str], Callable[[], object]] = {}
    for run in plan.unfinished:
        config = run.config
        if isinstance(config, FinetuneConfig | EvaluateConfig | EncodeConfig):
            checks["--data", config.data] = partial(open_images, config.data)
            if config.autoencoder not in made:
                checks["--autoencoder", config.autoencoder] = partial(load_autoencoder, config.autoencoder)
        if isinstance(config, FinetuneConfig):
            checks["--finetune-data", config.data] = partial(open_images, config.data)
            checks["--validation-data", config.validation_data] = partial(open_images, config.validation_data)
        if isinstance(config, ReferenceConfig):
            open_it = partial(open_reference, config.reference, image_size_px=config.image_size)
            checks["--reference-data", config.reference] = open_it
    for flag, value in checks:
        if value == GIVEN_LATER and flag != "--data":
            raise UserError(f"reproduction at this scale needs {flag}", "See 'eqvae reproduce --help'")
    for (_, value), check in checks.items():
        if value != GIVEN_LATER:
            check()


def split_name(given: str) -> tuple[str, str]:
    """Read `[NAME=]AUTOENCODER`."""
    name, separator, location = given.partition("=")
    if separator:
        if not name or not location or "/" in name:
            raise UserError(f"--autoencoder '{given}' can't be read", "Write it as NAME=PATH, or only the path")
        return name, location
    return (given if given in PRESETS else short_name(Path(given).resolve())), given


def _check_root(config: ReproduceConfig) -> None:
    """Refuse a root that is something else, or of another scale."""
    root = config.out
    if not (root / CONFIG).is_file() and root.is_dir() and all(path.name.startswith(".") for path in root.iterdir()):
        check_writable(root, "--out")  # empty, or another process is just beginning there
        return
    if claim_output_folder(root, "reproduce") is None:
        return
    scale = read_json(root / CONFIG).get("scale")
    if scale != config.scale:
        raise UserError(f"--out '{root}' holds runs of --scale {scale}, not {config.scale}", "Choose another --out")


def _write(items: Sequence[Item], root: Path) -> list[Path]:
    return [
        file
        for item in items
        for file in (write_table(item, root) if isinstance(item, Table) else write_figure(item, root))
    ]
