"""The page's words and figures: the headline, what a reader must know, how generators were trained and sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eqvae.drawing.comparison import findings, last_value
from eqvae.drawing.comparison_charts import quality_label
from eqvae.drawing.folders import Contents, Evaluation, SampleSet, Score, Training
from eqvae.drawing.panels import sample_distances
from eqvae.drawing.tables import COUNT, ERRORS, PSNR, Metric, data_name, score_columns
from eqvae.evidence.arms import RunComparison
from eqvae.evidence.curves import finite, short_name

MAX_TILES = 4

SAMPLER_OF = {"maskgit": "confidence", "dit": "ddpm", "gat": "one-pass"}
"""Samplers that `eqvae sample` takes where none is named, by the recipe's family; the others take `sde`."""

DRAWING = {
    "num_samples": "Samples", "num_steps": "Steps", "rtol": "Relative tolerance", "ddim_eta": "Eta",
    "guidance_scale": "Guidance scale", "guidance_low": "Guided from noise", "guidance_high": "Guided up to noise",
    "guidance_channels": "Guided channels", "guidance_schedule": "Guidance schedule", "truncation": "Truncation",
    "weak_run": "Guided away from",
    "weights": "Weights", "sigma_rel": "Averaging horizon", "classes": "Classes", "seed": "Seed",
}  # fmt: skip
"""What a sample set's configuration says of how it was drawn, and how the page names it."""

SILENT = {"ddim_eta": 0.0, "guidance_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, "truncation": 0.0}
"""Values that change nothing and are left out."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One large figure under the headline."""

    label: str
    figure: str
    detail: str = ""
    improves: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The first thing one reads."""

    title: str
    sentence: str
    tiles: Sequence[Tile] = ()


def headline(contents: Contents, shared: Sequence[RunComparison] = ()) -> Headline:
    """Sum the report up by what it shows of autoencoders, else of scores, else of training, else of samples."""
    evaluations, runs, trainings, sample_sets, scores = contents
    if evaluations:
        return _change_of_items(evaluations, (*ERRORS, PSNR))
    if runs:
        validations = runs[0].records("validation")
        if len(validations) < 2:
            return Headline(title=runs[0].name, sentence="The run has not been validated twice yet.")
        return _of_tiles(runs[0].name, _changes(validations[0], validations[-1], (*ERRORS, PSNR)))
    if scores:
        columns = [metric for metric in score_columns(scores) if metric is not COUNT]
        return _change_of_items(scores, columns[:MAX_TILES])
    if shared:
        return _of_curves(shared[0])
    if trainings:
        return _of_training(trainings)
    return Headline(
        title=_and_more(sample_sets[0].name, sample_sets), sentence=_in_words(drawing_facts(sample_sets[0]))
    )


def notes(contents: Contents) -> list[str]:
    """Say what may not be compared, what is unfinished, and what went wrong."""
    evaluations = contents.evaluations
    found = []
    different = [item for item in evaluations[1:] if item.conditions != evaluations[0].conditions]
    if different:
        conditions = "; ".join(f"{item.name} on {item.describe_conditions()}" for item in (evaluations[0], *different))
        found.append(f"Not comparable, so changes are left out: {conditions}.")
    found += [f"{item.name}: the evaluation has no pictures." for item in evaluations if item.pictures is None]
    for run in (*contents.runs, *contents.trainings):
        if not run.journal:
            found.append(f"{run.name}: the run has no journal yet.")
        elif not run.is_finished:
            steps = training_facts(run)["Steps"] if isinstance(run, Training) else f"{run.step:,}"
            found.append(f"{run.name}: not finished, steps {steps}.")
    items = (*evaluations, *contents.runs, *contents.scores)
    return found + [f"{item.name}: {message}" for item in items for message in item.messages]


def shared_conditions(evaluations: Sequence[Evaluation]) -> str:
    """Say once what all evaluations were measured on."""
    is_shared = evaluations and all(item.conditions == evaluations[0].conditions for item in evaluations)
    return evaluations[0].describe_conditions() if is_shared else ""


def training_facts(training: Training) -> dict[str, str]:
    """List how a generator was trained and measured, and how far it is."""
    config, wanted = training.config, training.config.get("max_steps")
    step, count = training.step, training.num_images(training.step)
    is_whole = training.is_finished or wanted is None
    facts = {"Steps": f"{step:,}" if is_whole else f"{step:,} of {wanted:,}"}
    if count is not None:
        facts |= {"Batch size": f"{config['batch_size']:,}", "Images seen": f"{count:,}"}
    for record in training.records("train")[-1:]:
        if seconds := finite(record.get("training_sec")):
            facts["Training time"] = _duration(seconds)
    if (num_parameters := finite(training.metrics.get("num_parameters"))) is not None:
        facts["Network"] = f"{num_parameters / 1e6:,.1f} million parameters"
    settings = {"learning_rate": "Learning rate", "ema_decay": "EMA", "seed": "Seed", "watch_steps": "Sampling steps"}
    facts |= {name: f"{value:g}" for key, name in settings.items() if (value := finite(config.get(key))) is not None}
    if config.get("reference") is not None:
        facts["Measured"] = f"against {data_name(config['reference'])}, no guidance, averaged weights"
    return facts


def drawing_facts(samples: SampleSet) -> dict[str, str]:
    """List how samples were drawn."""
    config, card = {**samples.config, "num_samples": samples.metrics.get("num_samples")}, samples.card
    recipe = str(card.get("recipe", ""))
    sampler = config.get("sampler") or SAMPLER_OF.get(recipe.partition("-")[0], "sde")
    trained = f" after {card['num_steps']:,} steps" if isinstance(card.get("num_steps"), int) else ""
    on = f" on {short_name(card['autoencoder'])}" if "autoencoder" in card else ""
    name = recipe or short_name(config.get("run", "a generator"))
    facts = {"Generator": f"{name}{on}{trained}", "Sampler": str(sampler)}
    foreign = {"num_steps"} if sampler == "dopri5" else {"rtol"}
    for key, name in DRAWING.items():
        value = config.get(key)
        if value is not None and value != SILENT.get(key) and key not in foreign:
            facts[name] = (
                f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
            )
    return facts


def _change_of_items(items: Sequence[Evaluation] | Sequence[Score], metrics: Sequence[Metric]) -> Headline:
    """The figures of the only item, else the change from the first to the last."""
    first, last = items[0], items[-1]
    if len(items) == 1:
        return _of_tiles(first.name, _figures(first.metrics, metrics))
    title = f"{first.name} → {last.name}"
    if first.conditions != last.conditions:
        return Headline(title=title, sentence="Measured under different conditions: no change is computed.")
    return _of_tiles(title, _changes(first.metrics, last.metrics, metrics))


def _of_curves(shared: RunComparison) -> Headline:
    arms, label = shared.arms, quality_label(shared)
    tiles = [
        Tile(label=arm.name, figure=last_value(shared, arm), detail=f"{label} after {arm.num_images[-1]:,} images")
        for arm in arms[:MAX_TILES]
    ]
    title = f"{arms[0].name} → {arms[1].name}" if len(arms) == 2 else f"{len(arms)} training runs"
    return Headline(title=title, sentence=findings(shared)[0], tiles=tiles)


def _of_training(trainings: Sequence[Training]) -> Headline:
    first = next((item for item in trainings if sample_distances(item)), trainings[0])
    title, found = _and_more(first.name, trainings), sample_distances(first)
    if not found:
        return Headline(title=title, sentence=f"Its samples have not been measured. {_in_words(training_facts(first))}")
    metric, (start, *_, end) = found[-1].metric, (found[-1].records[0], *found[-1].records)
    if start is end:
        return _of_tiles(title, _figures(end, [metric]), f" at step {end['step']:,}, its only measurement so far")
    return _of_tiles(title, _changes(start, end, [metric]), f" between steps {start['step']:,} and {end['step']:,}")


def _figures(metrics: Mapping[str, Any], shown: Sequence[Metric]) -> list[Tile]:
    return [
        Tile(
            label=metric.label,
            figure=f"{metric.show(value)} {metric.unit}".strip(),
            detail=f"{metric.better} is better",
        )
        for metric in shown
        if (value := metric.of(metrics)) is not None
    ]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], shown: Sequence[Metric]) -> list[Tile]:
    tiles = []
    for metric in shown:
        first, last = metric.of(before), metric.of(after)
        if first is not None and last is not None:
            detail = f"{metric.show(first)} → {metric.show(last)} {metric.unit}".strip()
            change, improves = metric.show_change(first, last), metric.improves(first, last)
            tiles.append(Tile(label=metric.label, figure=change, detail=detail, improves=improves))
    return tiles


def _of_tiles(title: str, tiles: Sequence[Tile], where: str = "") -> Headline:
    return Headline(title=title, sentence=_in_words({tile.label: tile.figure for tile in tiles}, where), tiles=tiles)


def _in_words(facts: Mapping[str, str], where: str = "") -> str:
    """Join facts to a sentence, in which only names such as PSNR keep their capitals."""
    parts = [f"{name.lower() if name == name.capitalize() else name} {text}" for name, text in facts.items()]
    words = ", ".join(parts) or "no figure was measured"
    return f"{words[0].upper()}{words[1:]}{where}."


def _and_more(name: str, items: Sequence[object]) -> str:
    return f"{name} and {len(items) - 1} more" if len(items) > 1 else name


def _duration(seconds: float) -> str:
    sizes = ((3600.0, "h"), (60.0, "min"))
    return next((f"{seconds / size:.1f} {unit}" for size, unit in sizes if seconds >= 2 * size), f"{seconds:.0f} s")
