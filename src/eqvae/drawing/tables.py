"""Tables of figures: one row for each autoencoder or sample set, the best figure of each column, the changes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from eqvae.drawing.folders import Evaluation, Score
from eqvae.evidence.curves import finite

MISSING = "\N{EN DASH}"
"""Stands where a table has nothing to say."""

Item = TypeVar("Item")
Measured = TypeVar("Measured", Evaluation, Score)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one figure is named, printed and judged."""

    key: str
    """Its key in metrics.json."""

    label: str

    better: Literal["lower", "higher", "neither"] = "lower"

    digits: int = 3
    """After the decimal point."""

    unit: str = ""

    error_key: str = ""
    """The key of its standard error, where it has one."""

    @property
    def arrow(self) -> str:
        """The direction of better figures."""
        return {"lower": "↓", "higher": "↑", "neither": ""}[self.better]

    def of(self, metrics: Mapping[str, Any]) -> float | None:
        """Look the figure up."""
        return finite(metrics.get(self.key))

    def show(self, value: float) -> str:
        """Print a figure."""
        return with_minus_sign(f"{value:.{self.digits}f}")

    def show_of(self, metrics: Mapping[str, Any]) -> str | None:
        """Print the figure with its standard error."""
        value, error = self.of(metrics), finite(metrics.get(self.error_key))
        if value is None:
            return None
        return self.show(value) if error is None else f"{self.show(value)} ± {self.show(error)}"

    def show_change(self, before: float, after: float) -> str:
        """Print a change: in percent where lower is better (errors), else, and in dB, as a difference."""
        if self.better == "lower" and self.unit != "dB":
            if before > 0:
                return with_minus_sign(f"{100 * (after / before - 1):+.0f}%")
            if before == 0:
                return ""
        return with_minus_sign(f"{after - before:+.{self.digits}f} {self.unit}".strip())

    def improves(self, before: float, after: float) -> bool | None:
        """Whether the second figure is better."""
        if self.better == "neither" or self.show(before) == self.show(after):
            return None
        return (after < before) == (self.better == "lower")


@dataclass(frozen=True, kw_only=True)
class Distance(Metric):
    """A Frechet distance with certain features; only Inception's make it an FID."""

    features: str
    """As the user named them."""

    @property
    def is_fid(self) -> bool:
        """Whether published figures may be set beside it."""
        return self.features == "inception"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of a table."""

    text: str

    change: str = ""
    """Against the first row under the same conditions; empty in that row."""

    improves: bool | None = None
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class FigureTable:
    """Columns are metrics; rows are autoencoders or sample sets."""

    metrics: tuple[Metric, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    """Names and their cells."""


METRICS = (
    Metric(key="equivariance_error_rotation", label="Rotation error"),
    Metric(key="equivariance_error_scale", label="Scale error"),
    Metric(key="psnr_db", label="PSNR", better="higher", digits=2, unit="dB"),
    Metric(key="ssim", label="SSIM", better="higher"),
    Metric(key="lpips", label="LPIPS"),
    Metric(key="latent_std", label="Latent std", better="neither", digits=2),
    Metric(key="token_agreement_rotation", label="Tokens kept, rotation", better="higher"),
    Metric(key="token_agreement_scale", label="Tokens kept, scale", better="higher"),
    Metric(key="codebook_usage", label="Codes used", better="higher"),
    Metric(key="codebook_perplexity", label="Codebook perplexity", better="higher", digits=0),
)
"""The columns of the main table; those that no evaluation has measured are left out. The last four are of discrete
autoencoders: shares of 1, but for the perplexity, which counts codes."""

ERRORS, PSNR = METRICS[:2], METRICS[2]
LATENT_STD, TOKENS = METRICS[5], METRICS[6:8]

INTRINSIC_DIMENSION = Metric(
    key="intrinsic_dimension", label="Intrinsic dimension", digits=1, error_key="intrinsic_dimension_standard_error"
)
SPECTRUM_EXCESS = Metric(key="spectrum_excess_db", label="Spectrum excess", digits=1, unit="dB")

FID = Metric(key="fid", label="FID", digits=2)
PRECISION, RECALL = (Metric(key=name.lower(), label=name, better="higher") for name in ("Precision", "Recall"))
INCEPTION = (
    FID,
    Metric(key="sfid", label="sFID", digits=2),
    Metric(
        key="inception_score", label="Inception Score", better="higher", digits=2, error_key="inception_score_std"
    ),
    Metric(key="kid", label="KID", digits=4, error_key="kid_std"),
    PRECISION,
    RECALL,
)  # fmt: skip
"""Scores by Inception's features, in the order of the columns."""

COUNT = Metric(key="num_samples", label="Samples", better="neither", digits=0)

DISTANCE = re.compile(r"([ri])(fid|fd_[a-z0-9_]+?)(_authors)?(?:_(?:rotation|scale)(?:_[0-9.]+)?)?")
"""Keys of Frechet distances: of reconstructions (r) or interpolations (i), these as the paper or as its authors' code
has them, plain or after a transformation."""

OTHER_FEATURES = re.compile(r"(fd|kd|precision|recall)_(?!std_)(.+)")
"""Keys of scores by other features, which bear their names."""


def figure_table(items: Sequence[Measured], metrics: Sequence[Metric] = METRICS) -> FigureTable:
    """Set figures side by side; only those measured under the same conditions are judged."""
    present = tuple(metric for metric in metrics if any(metric.of(item.metrics) is not None for item in items))
    rows = tuple((item.name, tuple(_cell(item, metric, items) for metric in present)) for item in items)
    return FigureTable(metrics=present, rows=rows)


def main_columns(evaluations: Sequence[Evaluation]) -> tuple[Metric, ...]:
    """Choose the main table's columns: equivariance, then reconstruction."""
    elsewhere = (*ERRORS, LATENT_STD) if predictor_columns(evaluations) else ERRORS
    others = [metric for metric in METRICS if metric not in elsewhere]
    return (*ERRORS, *distances(evaluations, "r"), *others)


def predictor_columns(evaluations: Sequence[Evaluation]) -> tuple[Metric, ...]:
    """Choose the columns of the table of what predicts a generator's quality without training one."""
    geometry = (INTRINSIC_DIMENSION, *distances(evaluations, "i"), SPECTRUM_EXCESS)
    is_measured = any(metric.of(item.metrics) is not None for item in evaluations for metric in geometry)
    return (*geometry, *ERRORS, LATENT_STD) if is_measured else ()


def card_columns(evaluations: Sequence[Evaluation]) -> tuple[Metric, ...]:
    """Choose the figures that stand on the autoencoders' cards: what the charts there do not say."""
    measured = (metric for metric in TOKENS if any(metric.of(item.metrics) is not None for item in evaluations))
    geometry = (INTRINSIC_DIMENSION, *distances(evaluations, "i"))
    return (*distances(evaluations, "r"), PSNR, *ERRORS, *geometry, *measured)


def distances(evaluations: Sequence[Evaluation], kind: Literal["r", "i"]) -> tuple[Distance, ...]:
    """Find the Frechet distances that were measured, plain or after transformations."""
    found: dict[str, Distance] = {}
    for item in evaluations:
        for key, value in item.metrics.items():
            match = DISTANCE.fullmatch(key)
            if match is None or match[1] != kind or finite(value) is None:
                continue
            plain, is_fid = kind + match[2] + (match[3] or ""), match[2] == "fid"
            if plain in found:
                continue
            slug = match[2].removeprefix("fd_")
            features = "inception" if is_fid else features_name(slug, [item.config.get("features")])
            label = f"{kind}FID" if is_fid else f"{kind}FD ({features})"
            label += ", authors' code" if match[3] else ""
            digits = FID.digits if is_fid else digits_for([other.metrics.get(plain) for other in evaluations])
            found[plain] = Distance(key=plain, label=label, digits=digits, features=features)
    return tuple(found.values())


def transform_metrics(
    evaluations: Sequence[Evaluation], measure: str = "equivariance_error", digits: int = 3
) -> tuple[Metric, ...]:
    """Name the figures of single transformations: their equivariance errors, or another measure."""
    pattern = re.compile(re.escape(measure) + r"_(rotation|scale)_([0-9.]+)")
    keys = dict.fromkeys(key for item in evaluations for key in item.metrics)
    matches = sorted(
        (found for found in map(pattern.fullmatch, keys) if found), key=lambda found: (found[1], float(found[2]))
    )
    return tuple(
        Metric(key=found[0], label=f"{found[2]}°" if found[1] == "rotation" else f"s = {found[2]}", digits=digits)
        for found in matches
    )


def latent_statistics(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """Print the latents' statistics: fine-tuning moves their scale, and a generator must normalize by them."""
    rows = []
    for item in evaluations:
        channels = range(sum(key.removeprefix("latent_mean_").isdigit() for key in item.metrics))
        columns = [
            Metric(key=f"latent_mean_{channel}", label="", digits=2, error_key=f"latent_std_{channel}")
            for channel in channels
        ]
        cells = [text for column in columns if (text := column.show_of(item.metrics)) is not None]
        rows += [(item.name, cells)] if cells else []
    return rows


def score_tables(scores: Sequence[Score]) -> list[tuple[list[Score], FigureTable]]:
    """Gather scores against the same reference into tables."""
    groups = grouped(scores, lambda one, other: _reference_key(one) == _reference_key(other))
    return [(group, figure_table(group, score_columns(group))) for group in groups]


def score_columns(scores: Sequence[Score]) -> tuple[Metric, ...]:
    """Choose a table's columns: what the scores have measured, figures of different features apart."""
    keys = dict.fromkeys(key for item in scores for key, value in item.metrics.items() if finite(value) is not None)
    columns = [metric for metric in INCEPTION if metric.key in keys]
    slugs = list(dict.fromkeys(found[2] for key in keys if (found := OTHER_FEATURES.fullmatch(key))))
    is_alone = not columns and len(slugs) == 1
    for slug in slugs:
        name = features_name(slug, [item.config.get("features") for item in scores])
        features = "" if is_alone else f" ({name})"
        for measure in ("fd", "kd"):
            digits = digits_for([item.metrics.get(f"{measure}_{slug}") for item in scores])
            label = f"FD ({name})" if measure == "fd" else f"KD{features}"
            error_key = f"kd_std_{slug}" if measure == "kd" else ""
            columns.append(Metric(key=f"{measure}_{slug}", label=label, digits=digits, error_key=error_key))
        for kin in (PRECISION, RECALL):
            columns.append(Metric(key=f"{kin.key}_{slug}", label=kin.label + features, better="higher"))
    return tuple(metric for metric in (*columns, COUNT) if metric.key in keys)


def distance_metric(key: str, features: object, values: Sequence[float]) -> Metric:
    """Describe the Frechet distance that a training run's validations hold."""
    if key == FID.key:
        return FID
    name = features_name(key.removeprefix("fd_"), [features])
    return Metric(key=key, label=f"FD ({name})", digits=digits_for(values))


def features_name(slug: str, named: Sequence[object]) -> str:
    """Find how the user named the features of a key, which has no hyphens."""
    slugs = {re.sub("[^a-z0-9]+", "_", str(name).lower()): str(name) for name in named}
    return slugs.get(slug, slug.replace("_", "-"))


def digits_for(values: Sequence[Any]) -> int:
    """Choose how many digits stand after the point: features differ in scale by orders of magnitude."""
    largest = max((abs(value) for value in map(finite, values) if value is not None), default=0.0)
    return next((digits for bound, digits in ((100.0, 1), (1.0, 2), (0.1, 3), (0.01, 4)) if largest >= bound), 5)


def data_name(source: Any) -> str:
    """Shorten what was given as a reference: the last part of a path, which may be gone by now."""
    return str(source) if str(source).startswith("hf:") else Path(str(source)).name


def grouped(items: Sequence[Item], alike: Callable[[Item, Item], bool]) -> list[list[Item]]:
    """Gather what is alike, in the order of the first of each group."""
    groups: list[list[Item]] = []
    for item in items:
        group = next((group for group in groups if alike(group[0], item)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    return groups


def comparable_groups(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    """Gather the evaluations that were made under the same conditions: only those share a chart."""
    return grouped(evaluations, lambda one, other: one.conditions == other.conditions)


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, num_text_columns: int = 1) -> str:
    """Write a table in Markdown."""
    alignment = ["---"] * num_text_columns + ["---:"] * (len(names) - num_text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, alignment, *rows))


def short_number(value: float) -> str:
    """Print a value with three digits, thousands in full."""
    return with_minus_sign(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def with_minus_sign(text: str) -> str:
    """Set the typographic minus sign, as wide as a plus."""
    return text.replace("-", "\N{MINUS SIGN}")


def _cell(item: Measured, metric: Metric, items: Sequence[Measured]) -> Cell:
    value, text = metric.of(item.metrics), metric.show_of(item.metrics)
    if value is None or text is None:
        return Cell(text=MISSING)
    if metric is COUNT:
        return Cell(text=f"{value:,.0f}")
    rivals = [
        (rival, other)
        for rival in items
        if rival.conditions == item.conditions and (other := metric.of(rival.metrics)) is not None
    ]
    judged = [metric.improves(other, value) for _, other in rivals]
    is_best = True in judged and False not in judged
    first, before = rivals[0]
    if first is item:
        return Cell(text=text, is_best=is_best)
    change, improves = metric.show_change(before, value), metric.improves(before, value)
    return Cell(text=text, change=change, improves=improves, is_best=is_best)


def _reference_key(score: Score) -> tuple[object, ...]:
    """What makes two references the same: their pixels where they are known."""
    known = score.reference
    source = known.get("fingerprint") or known.get("data") or score.config.get("reference")
    return source, known.get("image_size_px")
