"""Tables of scores: one for each reference, a row for each score; only figures that may be compared are judged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eqvae.report.generators import Score, data_name
from eqvae.report.tables import MISSING, Cell, Metric, Table, finite

INCEPTION = {
    "fid": Metric(key="fid", label="FID", digits=2),
    "sfid": Metric(key="sfid", label="sFID", digits=2),
    "inception_score": Metric(
        key="inception_score", label="Inception Score", better="higher", digits=2, error_key="inception_score_std"
    ),
    "kid": Metric(key="kid", label="KID", digits=4, error_key="kid_std"),
    "precision": Metric(key="precision", label="Precision", better="higher"),
    "recall": Metric(key="recall", label="Recall", better="higher"),
}
"""Figures of Inception's features, in the order of the columns."""

OTHER_FEATURES = re.compile(r"(fd|kd|precision|recall)_(?!std_)(.+)")
"""Keys of figures of other features, which bear their names."""

COUNT = Metric(key="num_samples", label="Samples", better="neither", digits=0)


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores against one reference."""

    reference: str
    """Short name."""

    scores: tuple[Score, ...]
    table: Table

    @property
    def caption(self) -> str:
        """For example `10,000 images of test.parquet, 32 px`."""
        counts = {value for item in self.scores if (value := finite(item.metrics.get("num_reference"))) is not None}
        sizes = {item.reference.get("image_size_px") for item in self.scores} - {None}
        count = f"{counts.pop():,.0f} images of " if len(counts) == 1 else ""
        return f"{count}{self.reference}" + (f", {sizes.pop()} px" if len(sizes) == 1 else "")


def score_tables(scores: Sequence[Score]) -> list[ScoreTable]:
    """Gather scores against the same reference into tables."""
    groups: dict[tuple[object, ...], list[Score]] = {}
    for item in scores:
        groups.setdefault(_reference(item), []).append(item)
    tables = []
    for members in groups.values():
        metrics = score_columns(members)
        rows = tuple((item.name, tuple(_cell(item, metric, members) for metric in metrics)) for item in members)
        name = data_name(members[0].reference.get("data") or members[0].config.get("reference", "unnamed"))
        tables.append(
            ScoreTable(reference=name, scores=tuple(members), table=Table(metrics=metrics, rows=rows))
        )  # fmt: skip
    return tables


def score_columns(scores: Sequence[Score]) -> tuple[Metric, ...]:
    """Choose a table's columns: what the scores have measured, figures of different features apart."""
    keys = dict.fromkeys(key for item in scores for key, value in item.metrics.items() if finite(value) is not None)
    columns = [metric for key, metric in INCEPTION.items() if key in keys]
    others = {key: found for key in keys if (found := OTHER_FEATURES.fullmatch(key))}
    is_alone = not columns and len({found[2] for found in others.values()}) == 1
    for slug in dict.fromkeys(found[2] for found in others.values()):
        features = features_name(slug, [item.config.get("features") for item in scores])
        for measure, kin in (("fd", "fid"), ("kd", "kid"), ("precision", "precision"), ("recall", "recall")):
            key = f"{measure}_{slug}"
            if key not in others:
                continue
            label = INCEPTION[kin].label if measure == kin else measure.upper()
            columns.append(
                Metric(
                    key=key,
                    label=label if is_alone and measure != "fd" else f"{label} ({features})",
                    better=INCEPTION[kin].better,
                    digits=_digits(scores, key) if measure != kin else INCEPTION[kin].digits,
                    error_key=f"kd_std_{slug}" if measure == "kd" else "",
                )
            )
    return (*columns, *([COUNT] if COUNT.key in keys else []))


def distance_metric(key: str, features: object, largest: float) -> Metric:
    """Describe the Frechet distance that a training run's validations hold."""
    if key == "fid":
        return INCEPTION["fid"]
    name = features_name(key.removeprefix("fd_"), [features])
    return Metric(key=key, label=f"FD ({name})", digits=digits_for(largest))


def features_name(slug: str, named: Sequence[object]) -> str:
    """Find how the user named the features of a key, which has no hyphens."""
    return next((str(name) for name in named if _slug(name) == slug), slug.replace("_", "-"))


def digits_for(largest: float) -> int:
    """Choose how many digits stand after the point: features differ in scale by orders of magnitude."""
    return next((digits for bound, digits in ((100.0, 1), (1.0, 2), (0.1, 3), (0.01, 4)) if largest >= bound), 5)


def primary_metric(scores: Sequence[Score]) -> Metric | None:
    """Choose the figure that sums scores up."""
    found = [metric for metric in score_columns(scores) if metric.key == "fid" or metric.key.startswith("fd_")]
    shared = [metric for metric in found if all(finite(item.metrics.get(metric.key)) is not None for item in scores)]
    return next(iter([*shared, *found]), None)


def _reference(score: Score) -> tuple[object, ...]:
    """What makes two references the same: their pixels where they are known."""
    known = score.reference
    if known.get("fingerprint"):
        return (known["fingerprint"], known.get("image_size_px"))
    return (known.get("data") or score.config.get("reference"), known.get("image_size_px"))


def _slug(name: object) -> str:
    return re.sub("[^a-z0-9]+", "_", str(name).lower())


def _digits(scores: Sequence[Score], key: str) -> int:
    return digits_for(max(abs(value) for item in scores if (value := finite(item.metrics.get(key))) is not None))


def _cell(score: Score, metric: Metric, scores: Sequence[Score]) -> Cell:
    value, error = (finite(score.metrics.get(key)) for key in (metric.key, metric.error_key))
    if value is None:
        return Cell(text=MISSING)
    if metric is COUNT:
        return Cell(text=f"{value:,.0f}")
    text = metric.show(value) if error is None else f"{metric.show(value)} ± {metric.show(error)}"
    rivals = [
        (item, other)
        for item in scores
        if item.conditions == score.conditions and (other := finite(item.metrics.get(metric.key))) is not None
    ]
    judged = [metric.improves(other, value) for _, other in rivals]
    is_best = True in judged and False not in judged
    first, before = rivals[0]
    if first is score:
        return Cell(text=text, is_best=is_best)
    change, improves = metric.show_change(before, value), metric.improves(before, value)
    return Cell(text=text, change=change, improves=improves, is_best=is_best)
