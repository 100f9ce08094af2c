"""Panels: small charts of one quantity each over a run's steps, of fine-tuning and of a generator's training.

Accent: what is trained, and the equivariance branch. Grey: the base autoencoder and the plain branch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float64, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy import ndarray

from eqvae.drawing.charts import ACCENT, BASE, INK, PAPER_STYLE, SIZE_INCHES, add_legend, in_legend, marks, page_chart
from eqvae.drawing.folders import FineTuning, Training
from eqvae.drawing.tables import (
    DISTANCE,
    INTRINSIC_DIMENSION,
    METRICS,
    SPECTRUM_EXCESS,
    Metric,
    distance_metric,
    short_number,
)
from eqvae.evidence.curves import finite
from eqvae.methods import METHODS, Term

MAX_POINTS = 1000
"""Of a line: panels are a few hundred pixels wide, and long runs log tens of thousands of steps."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One quantity over the run's steps."""

    name: str = ""
    """Of the branch, where branches are drawn apart."""
    color: str = ACCENT
    steps: Float64[ndarray, " n"]
    values: Float64[ndarray, " n"]

    is_noisy: bool = False
    """Draw the single values lightly and their moving average on top."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small chart."""

    title: str

    summary: str
    """For example `0.93 → 0.49`: for the caption, and for those who cannot see the chart."""

    y_label: str
    """With the unit."""

    series: tuple[Series, ...]

    base: float | None = None
    """The base autoencoder's figure, drawn as a dashed line."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A logged value and how its panel is labelled."""

    key: str
    title: str
    y_label: str
    is_noisy: bool = True


@dataclass(frozen=True, kw_only=True)
class Distances:
    """A training run's Frechet distances of one measure."""

    metric: Metric
    num_samples: int | None

    records: tuple[dict[str, Any], ...]
    """Validations by step; one or more."""


OPTIMIZATION = (
    Quantity(key="gradient_norm", title="Gradient norm", y_label="norm before clipping"),
    Quantity(key="learning_rate", title="Learning rate", y_label="learning rate", is_noisy=False),
)
PACE = Quantity(key="images_per_sec", title="Pace", y_label="images per second")

FINE_TUNING = {
    "Losses": (
        Quantity(key="reconstruction", title="Reconstruction", y_label="L1 + perceptual"),
        Quantity(key="l1", title="L1 of pixels", y_label="mean absolute error"),
        Quantity(key="perceptual", title="Perceptual", y_label="loss"),
        Quantity(key="kl", title="KL to N(0, I)", y_label="nats per image"),
        Quantity(key="explicit", title="Explicit equivariance", y_label="loss per image"),
    ),
    "Codebook": (
        Quantity(key="quantization", title="Quantization", y_label="squared distance to codes"),
        Quantity(key="codebook_usage", title="Codes used by a batch", y_label="share"),
        Quantity(key="codebook_perplexity", title="Perplexity of a batch", y_label="codes"),
    ),
    "Discriminator": (
        Quantity(key="adversarial", title="Adversarial loss", y_label="minus mean logit"),
        Quantity(key="discriminator", title="Discriminator loss", y_label="hinge loss"),
        Quantity(key="discriminator_r1", title="R1", y_label="half of the squared gradient"),
        Quantity(key="discriminator_lecam", title="LeCam", y_label="squared logits"),
        Quantity(key="adaptive_weight", title="Adaptive weight", y_label="weight"),
    ),
    "Optimization": OPTIMIZATION[::-1],
}
"""Panels for what a fine-tuning step logs; those that a run has not logged, or that are always 0, are left out."""

GENERATOR_LOSSES = {
    "mse": ("Squared error", "mean squared error"),
    "vb": ("Variational bound", "bits per dimension"),
    "repa": ("Alignment with the teacher", "minus mean cosine"),
    "cross_entropy": ("Cross-entropy", "nats per masked token"),
    "accuracy": ("Masked tokens guessed", "share"),
    "discriminator": ("Discriminator's loss", "nats per pair"),
    "margin": ("Logit of true latents over that of drawn ones", "difference"),
    "r1": ("Squared gradient at true latents", "R1"),
    "r2": ("Squared gradient at drawn latents", "R2"),
    "discriminator_gradient_norm": ("Discriminator's gradient norm", "norm before clipping"),
}
"""Titles and axes of known parts of a generator's loss; others are titled by their names."""

NO_LOSSES = frozenset(
    {"kind", "step", "loss", "gradient_norm", "learning_rate", "images_per_sec", "share_of_peak", "training_sec"}
)
"""What a generator's training record holds besides the parts of its loss."""


def run_panels(run: FineTuning) -> dict[str, list[Panel]]:
    """Choose what to draw of a fine-tuning run, under headings."""
    validations, records = run.records("validation"), run.records("train")
    groups: dict[str, list[Panel]] = {"Validation": []}
    for metric in (*METRICS, *_distances(validations), INTRINSIC_DIMENSION, SPECTRUM_EXCESS):
        y_label = metric.unit or ("relative squared error" if "error" in metric.key else metric.label)
        groups["Validation"] += _metric_panels(validations, metric, y_label, has_base=True)
    for title, quantities in FINE_TUNING.items():
        groups[title] = [
            panel
            for quantity in (*quantities, *(_terms() if title == "Losses" else ()))
            for panel in _step_panels(records, quantity)
        ]
    return {title: panels for title, panels in groups.items() if panels}


def _distances(validations: Sequence[dict[str, Any]]) -> list[Metric]:
    """The Frechet distances that validations hold, where they were watched."""
    found: dict[str, list[Any]] = {}
    for record in validations:
        for key in record:
            if DISTANCE.fullmatch(key):
                found.setdefault(key, []).append(record[key])
    named = {key: distance_metric(key[1:], None, values) for key, values in found.items()}
    return [replace(metric, key=key, label=key[0] + metric.label) for key, metric in named.items()]


def _terms() -> Iterator[Quantity]:
    """What methods add to the losses, with the weights of adaptive terms."""
    for name, kind in METHODS.items():
        if issubclass(kind, Term) and name not in ("kl", "explicit"):
            yield Quantity(key=name, title=f"Term {name}", y_label="per image")
            yield Quantity(key=f"{name}_weight", title=f"Adaptive weight of {name}", y_label="weight")


def training_panels(training: Training) -> list[Panel]:
    """Choose what to draw of a generator's training run: its samples' distance, losses, optimization, pace."""
    records = training.records("train")
    steps = [panel for quantity in (*_losses(records), *OPTIMIZATION) for panel in _step_panels(records, quantity)]
    pace = [
        replace(panel, summary=f"median {short_number(float(np.median(panel.series[0].values)))}")
        for panel in _step_panels(records, PACE)
    ]
    measured: list[Panel] = []
    for found in sample_distances(training):
        y_label = f"of {found.num_samples:,} samples" if found.num_samples is not None else found.metric.label
        measured += _metric_panels(found.records, found.metric, y_label)
    return [*measured, *steps, *pace]


def sample_distances(training: Training) -> list[Distances]:
    """Find what the run's samples were measured with."""
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for record in training.records("validation"):
        for key in record:
            if (key == "fid" or key.startswith("fd_")) and finite(record[key]) is not None:
                found.setdefault((key, record.get("num_samples")), []).append(record)
    return [
        Distances(
            metric=distance_metric(key, training.config.get("features"), [record[key] for record in records]),
            num_samples=count if isinstance(count, int) else None,
            records=tuple(records),
        )
        for (key, count), records in found.items()
    ]


def draw_panel(panel: Panel, id_prefix: str = "chart") -> str:
    """Draw a panel as an SVG element for use inside HTML."""
    return page_chart(partial(_draw_panel, panel), SIZE_INCHES, id_prefix)


def draw_panels(panels: Sequence[Panel]) -> Figure:
    """Draw panels as one figure, for papers."""
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)
    with matplotlib.rc_context(PAPER_STYLE):
        chart = Figure(figsize=(num_columns * SIZE_INCHES[0], num_rows * (SIZE_INCHES[1] + 0.3)), layout="constrained")
        for axes, panel in zip(chart.subplots(num_rows, num_columns, squeeze=False).flat, panels, strict=False):
            _draw_panel(panel, axes)
            axes.set_title(panel.title, fontsize=10, loc="left")
        for axes in chart.axes[len(panels) :]:
            axes.remove()
        branched = [axes for axes in chart.axes if axes.get_legend_handles_labels()[1]]
        if branched:
            add_legend(chart, branched[0])
    return chart


def smooth(values: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """Exponential moving average over about a tenth of the series, corrected for its start."""
    keep = 1.0 - 2.0 / (max(len(values) // 10, 1) + 1)
    total = weight = 0.0
    averages = np.empty(len(values))
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        averages[index] = total / weight
    return averages


def _metric_panels(
    records: Sequence[dict[str, Any]], metric: Metric, y_label: str, *, has_base: bool = False
) -> list[Panel]:
    """One, or none where the metric was not measured; a fine-tuning run's step 0 is the base autoencoder's."""
    series = _read_series(records, metric.key)
    if series is None:
        return []
    first, last = float(series.values[0]), float(series.values[-1])
    ends = metric.show(last) if len(series.values) == 1 else f"{metric.show(first)} → {metric.show(last)}"
    panel = Panel(
        title=f"{metric.label} {metric.arrow}".strip(),
        summary=f"{ends} {metric.unit}".strip(),
        y_label=y_label,
        series=(series,),
        base=first if has_base and series.steps[0] == 0 else None,
    )
    return [panel]


def _step_panels(records: Sequence[dict[str, Any]], quantity: Quantity) -> list[Panel]:
    """One, or none; a series for each branch where they are told apart, as levels differ."""
    equivariance = [record for record in records if "plain" not in record.get("branch", "equivariance")]
    plain = [record for record in records if "plain" in record.get("branch", "equivariance")]
    branches = {"": (records, ACCENT)}
    if quantity.is_noisy and equivariance and plain:
        names = {record.get("branch", "equivariance") for record in equivariance}
        other = f"{names.pop()} branch" if len(names) == 1 else "other branches"
        branches = {"plain branch": (plain, BASE), other: (equivariance, ACCENT)}
    found = {name: _read_series(of_branch, quantity.key, color) for name, (of_branch, color) in branches.items()}
    drawn = ((name, item) for name, item in found.items() if item is not None)
    series = tuple(replace(item, name=name, is_noisy=quantity.is_noisy) for name, item in drawn)
    if not any(item.values.any() for item in series):
        return []
    return [Panel(title=quantity.title, summary=_summary(series[-1]), y_label=quantity.y_label, series=series)]


def _losses(records: Sequence[dict[str, Any]]) -> list[Quantity]:
    """The loss and its parts; one that is all of the loss names the loss's axis instead of being drawn twice."""
    keys = dict.fromkeys(key for record in records for key, value in record.items() if finite(value) is not None)
    parts = [key for key in keys if key not in NO_LOSSES]
    whole = [key for key in parts if all(record.get(key) == record.get("loss") for record in records)]
    axis = GENERATOR_LOSSES[whole[0]][1] if whole and whole[0] in GENERATOR_LOSSES else "loss"
    quantities = [Quantity(key="loss", title="Loss", y_label=axis)]
    for key in parts:
        if key not in whole:
            title, axis = GENERATOR_LOSSES.get(key, (key.replace("_", " ").capitalize(), "loss"))
            quantities.append(Quantity(key=key, title=title, y_label=axis))
    return quantities


def _read_series(records: Sequence[dict[str, Any]], key: str, color: str = ACCENT) -> Series | None:
    points = [(record["step"], value) for record in records if (value := finite(record.get(key))) is not None]
    if not points:
        return None
    steps, values = np.array(points, dtype=np.float64).T
    return Series(color=color, steps=steps, values=values)


def _summary(series: Series) -> str:
    """First and last average of a noisy series; the peak of a schedule, whose ends say little."""
    if not series.is_noisy:
        return f"peak {short_number(series.values.max())}"
    averages = smooth(series.values)
    return f"{short_number(averages[0])} → {short_number(averages[-1])}"


def _draw_panel(panel: Panel, axes: Axes) -> None:
    for series in panel.series:
        _draw_series(axes, series)
    if panel.base is not None:
        axes.axhline(panel.base, color=BASE, linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "base", (1.0, panel.base), xycoords=axes.get_yaxis_transform(), xytext=(0, 3),
            textcoords="offset points", ha="right", va="bottom", color=INK, fontsize=9,
        )  # fmt: skip
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(y=0.12)


def _draw_series(axes: Axes, series: Series) -> None:
    if series.is_noisy:
        light, last = _extremes(series.values), len(series.values) - 1
        strong = np.unique(np.linspace(0, last, MAX_POINTS).astype(np.int64))
        look = marks(series.color, len(strong)) if series.name or last == 0 else {"color": series.color}
        axes.plot(series.steps[light], series.values[light], color=series.color, alpha=0.28, linewidth=0.9)
        look |= {"linewidth": 2.0, "label": in_legend(series.name)}
        axes.plot(series.steps[strong], smooth(series.values)[strong], **look)
    else:
        marker = "o" if len(series.steps) <= 20 else ""
        axes.plot(series.steps, series.values, color=series.color, linewidth=2.0, marker=marker, markersize=4)


def _extremes(values: Float64[ndarray, " n"]) -> Int64[ndarray, " m"]:
    """Indices of what can be seen of a long noisy line: the least and the largest value of each short stretch."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), MAX_POINTS // 2 + 1).astype(np.int64)
    ends = [
        first + place
        for first, last in pairwise(edges)
        for place in (values[first:last].argmin(), values[first:last].argmax())
    ]
    return np.unique(np.array(ends, dtype=np.int64))
