"""The first thing one reads: what changed, in a sentence and a few large figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eqvae.evidence.shared_curves import SharedCurves
from eqvae.report.contents import Contents
from eqvae.report.generator_panels import distances
from eqvae.report.generator_text import describe_drawing, describe_training
from eqvae.report.generators import Score, Training
from eqvae.report.score_tables import COUNT, primary_metric, score_columns
from eqvae.report.tables import METRICS, Metric, figure, finite

HEADLINE_KEYS = ("equivariance_error_rotation", "equivariance_error_scale", "psnr_db")


MAX_TILES = 4


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One large figure under the headline."""

    label: str
    figure: str
    detail: str
    improves: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The first thing one reads."""

    title: str
    sentence: str
    tiles: tuple[Tile, ...] = ()


def headline(contents: Contents, shared: Sequence[SharedCurves] = ()) -> Headline:
    """Sum the report up: the change from the first to the last evaluation, else over a run's validations.

    A page of generators alone begins with their scores, else with what training shows.
    """
    evaluations, runs = contents.evaluations, contents.runs
    if not evaluations and not runs:
        return _generators_headline(contents, shared)
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        title = f"{first.name} → {last.name}"
        if first.conditions != last.conditions:
            return Headline(title=title, sentence="Evaluated under different conditions: no change is computed.")
        return _change_headline(title, first.metrics, last.metrics, _headline_metrics())
    if evaluations:
        tiles = tuple(
            Tile(label=metric.label, figure=f"{metric.show(value)} {metric.unit}".strip(), detail=_direction(metric))
            for metric in _headline_metrics()
            if (value := figure(evaluations[0], metric.key)) is not None
        )
        words = ", ".join(f"{_in_sentence(tile.label)} {tile.figure}" for tile in tiles) or "No headline figures"
        return Headline(title=evaluations[0].name, sentence=words[0].upper() + words[1:] + ".", tiles=tiles)
    validations = runs[0].records("validation")
    if len(validations) < 2:
        return Headline(title=runs[0].name, sentence="The run has not been validated twice yet.")
    return _change_headline(runs[0].name, validations[0], validations[-1], _headline_metrics())


def _generators_headline(contents: Contents, shared: Sequence[SharedCurves]) -> Headline:
    if contents.scores:
        return _scores_headline(contents.scores)
    if shared:
        return _shared_headline(shared[0])
    if contents.trainings:
        return _training_headline(contents.trainings)
    first, *others = contents.sample_sets
    more = f" and {len(others)} more" if others else ""
    return Headline(title=f"{first.name}{more}", sentence=f"{describe_drawing(first)}.")


def _scores_headline(scores: Sequence[Score]) -> Headline:
    metrics = [metric for metric in score_columns(scores) if metric is not COUNT]
    first, last = scores[0], scores[-1]
    if len(scores) > 1:
        title = f"{first.name} → {last.name}"
        if first.conditions != last.conditions:
            return Headline(title=title, sentence="Scored under different conditions: no change is computed.")
        return _change_headline(title, first.metrics, last.metrics, metrics[:MAX_TILES])
    primary = primary_metric(scores)
    shown = [metric for metric in metrics if finite(first.metrics.get(metric.key)) is not None][:MAX_TILES]
    tiles = tuple(
        Tile(label=metric.label, figure=metric.show(first.metrics[metric.key]), detail=_direction(metric))
        for metric in shown
    )
    count = finite(first.metrics.get(COUNT.key))
    words = f"{primary.label} {primary.show(first.metrics[primary.key])}" if primary is not None else "No distance"
    sentence = words + (f", by {count:,.0f} samples." if count is not None else ".")
    return Headline(title=first.name, sentence=sentence, tiles=tiles)


def _shared_headline(shared: SharedCurves) -> Headline:
    comparison = shared.comparison
    arms = comparison.arms
    tiles = tuple(
        Tile(
            label=arm.name,
            figure=f"{float(arm.by_images().mean().values[0, -1]):.{comparison.digits}f}",
            detail=f"{comparison.label} after {arm.num_images[-1]:,} images",
        )
        for arm in arms[:MAX_TILES]
    )
    title = f"{arms[0].name} → {arms[1].name}" if len(arms) == 2 else f"{len(arms)} training runs"
    if comparison.comparisons:
        return Headline(title=title, sentence=shared.findings[0], tiles=tiles)
    best = min(arms, key=lambda arm: float(arm.by_images().mean().values[0, -1]))
    sentence = f"{best.name} has the lowest {comparison.label} so far, each by its own last measurement."
    return Headline(title=title, sentence=sentence, tiles=tiles)


def _training_headline(trainings: Sequence[Training]) -> Headline:
    first = next((item for item in trainings if distances(item)), trainings[0])
    more = f" and {len(trainings) - 1} more" if len(trainings) > 1 else ""
    title, found = f"{first.name}{more}", distances(first)
    if not found:
        return Headline(title=title, sentence=f"{describe_training(first)}; its samples have not been measured.")
    metric, records = found[-1].metric, found[-1].records
    if len(records) > 1:
        change = _change_headline(title, records[0], records[-1], [metric])
        return Headline(
            title=title,
            sentence=f"{change.sentence[:-1]} between steps {records[0]['step']:,} and {records[-1]['step']:,}.",
            tiles=change.tiles,
        )
    value, step = metric.show(records[-1][metric.key]), records[-1]["step"]
    return Headline(
        title=title,
        sentence=f"{metric.label} {value} at step {step:,}, its only measurement so far.",
        tiles=(Tile(label=metric.label, figure=value, detail=_direction(metric)),),
    )


def _change_headline(
    title: str, before: Mapping[str, object], after: Mapping[str, object], metrics: Sequence[Metric]
) -> Headline:
    phrases, tiles, previous_verb = [], [], ""
    for metric in metrics:
        first, last = finite(before.get(metric.key)), finite(after.get(metric.key))
        if first is None or last is None:
            continue
        change = metric.show_change(first, last)
        verb, amount = _verb_and_amount(metric, change)
        phrases.append(
            " ".join(filter(None, (_in_sentence(metric.label), "" if verb == previous_verb else verb, amount)))
        )
        previous_verb = verb
        detail = f"{metric.show(first)} → {metric.show(last)} {metric.unit}".strip()
        tiles.append(Tile(label=metric.label, figure=change, detail=detail, improves=metric.improves(first, last)))
    sentence = ", ".join(phrases) or "No figure was measured at both ends"
    return Headline(title=title, sentence=sentence[0].upper() + sentence[1:] + ".", tiles=tuple(tiles))


def _verb_and_amount(metric: Metric, change: str) -> tuple[str, str]:
    """For example ("fell", "by 47%") or ("changed", "by −0.30 dB"); ("stayed", "the same") where nothing shows."""
    if not any(digit in change for digit in "123456789"):
        return "stayed", "the same"
    if metric.better == "lower":
        return ("rose" if change.startswith("+") else "fell"), f"by {change[1:]}"
    return "changed", f"by {change}"


def _headline_metrics() -> list[Metric]:
    return [metric for metric in METRICS if metric.key in HEADLINE_KEYS]


def _in_sentence(label: str) -> str:
    return label if label != label.capitalize() else label[0].lower() + label[1:]


def _direction(metric: Metric) -> str:
    return f"{metric.better} is better"
