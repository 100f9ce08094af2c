"""`eqvae reproduce --dry-run`: the runs of a plan in order, with state, operations, hours of a device, and disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eqvae.errors import UserError, nearest_name
from eqvae.images import open_images
from eqvae.images.image_sets import open_reference
from eqvae.paper import costs
from eqvae.paper.costs import Cost, Sizes
from eqvae.paper.planned import Plan, PlannedRun
from eqvae.paper.reference import ReferenceConfig
from eqvae.paper.setting import Setting
from eqvae.paper.settings import SETTINGS
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.reproduce import ReproduceConfig, make_items, make_setting
from eqvae.runs.sample import SampleConfig
from eqvae.runs.score import ScoreConfig
from eqvae.runs.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one run will cost, or has cost."""

    run: PlannedRun

    state: str
    """`done`, `begun` or `to do`."""

    items: tuple[str, ...]
    """Tables and figures that share it."""

    cost: Cost


def describe_plan(config: ReproduceConfig, settings: Mapping[str, Setting] = SETTINGS) -> str:
    """Work out what a reproduction would do and cost. Nothing is written, and no default data are opened."""
    if config.device_name not in costs.DEVICES:
        raise UserError(
            f"--device-name '{config.device_name}' is not known", nearest_name(config.device_name, costs.DEVICES)
        )
    setting = make_setting(config, settings)
    items = make_items(config.items, setting)
    plan = Plan.of(run for item in items for run in item.runs)
    plan.check_saved()
    for data in (config.data, config.finetune_data, config.validation_data):
        if data is not None:
            open_images(data)
    if config.reference_data is not None:
        open_reference(config.reference_data, image_size_px=setting.reference.image_size)
    closures = {item.item: {run.name for run in Plan.of(item.runs).runs} for item in items}
    estimates = [
        Estimate(
            run=run,
            state="done" if run.is_finished else "begun" if run.has_begun else "to do",
            items=tuple(name for name, names in closures.items() if run.name in names),
            cost=estimate(run, setting, config.device_name),
        )
        for run in plan.runs
    ]
    return _show(estimates, config.device_name)


def estimate(run: PlannedRun, setting: Setting, device: str) -> Cost:
    """Estimate one run."""
    match run.config:
        case ReferenceConfig() as config:
            return costs.reference_cost(
                config.features, setting.num_reference_images, device, precision=config.precision
            )
        case FinetuneConfig() as config:
            return costs.finetune_cost(config, _sizes(run, setting), device)
        case EvaluateConfig() as config:
            return costs.evaluate_cost(config, _sizes(run, setting), device)
        case EncodeConfig() as config:
            return costs.encode_cost(config, _sizes(run, setting), device)
        case TrainConfig() as config:
            return costs.train_cost(config, _sizes(run, setting), device)
        case SampleConfig() as config:
            return costs.sample_cost(config, _generator_of(run), _sizes(run, setting), device)
        case ScoreConfig() as config:
            return costs.score_cost(config, _sizes(run, setting), device)


def _sizes(run: PlannedRun, setting: Setting) -> Sizes:
    sampled = next((need.config for need in run.needs if isinstance(need.config, SampleConfig)), None)
    return Sizes(
        autoencoder=run.architecture if run.architecture is not None else setting.generator_base,
        num_images=setting.encoding.num_images or setting.num_images,
        image_size_px=setting.encoding.image_size,
        num_classes=setting.num_classes,
        num_evaluation_images=setting.num_validation_images,
        num_samples=sampled.num_samples if sampled is not None else setting.scoring.num_images or 0,
    )


def _generator_of(run: PlannedRun) -> str:
    """The recipe of the generator that a sample set is drawn from."""
    (recipe,) = (need.config.recipe for need in run.needs if isinstance(need.config, TrainConfig))
    return recipe


def _show(estimates: Sequence[Estimate], device: str) -> str:
    """Line the runs up, with sums of what is left and of all."""
    hours = f"{device} hours"
    rows = [("run", "state", "for", "FLOPs", hours, "disk")]
    for each in estimates:
        shown = (f"{each.run.command} {each.run.name}", each.state, ",".join(each.items))
        rows.append((*shown, *_show_cost(each.cost)))
    left = sum((each.cost for each in estimates if each.state != "done"), Cost())
    total = sum((each.cost for each in estimates), Cost())
    num_left = sum(each.state != "done" for each in estimates)
    rows.append((f"{num_left} runs to do", "", "", *_show_cost(left)))
    rows.append((f"all {len(estimates)} runs", "", "", *_show_cost(total)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            entry.rjust(width) if column > 2 else entry.ljust(width)
            for column, (entry, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _show_cost(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.flops:.2e}", f"{cost.device_hours:.3g}", _show_bytes(cost.disk_bytes)


def _show_bytes(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
