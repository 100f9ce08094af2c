"""What is drawn of a generator's training run: its samples' distance, losses, optimization, pace."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eqvae.report.generators import Training
from eqvae.report.panels import Panel, Quantity, draw_panels, read_series, short_number, training_panel
from eqvae.report.score_tables import distance_metric
from eqvae.report.tables import Metric, finite

PARTS = {
    "mse": ("Squared error", "mean squared error"),
    "vb": ("Variational bound", "bits per dimension"),
    "repa": ("Alignment with the teacher", "minus mean cosine"),
    "cross_entropy": ("Cross-entropy", "nats per masked token"),
    "accuracy": ("Masked tokens guessed", "share"),
}
"""Titles and axes of known parts of a loss; others are titled by their names."""

NO_LOSSES = frozenset(
    {"kind", "step", "loss", "gradient_norm", "learning_rate", "images_per_sec", "share_of_peak", "training_sec"}
)
"""What a training record holds besides the parts of its loss."""

OPTIMIZATION = (
    Quantity(key="gradient_norm", title="Gradient norm", y_label="norm before clipping"),
    Quantity(key="learning_rate", title="Learning rate", y_label="learning rate", is_noisy=False),
)

PACE = Quantity(key="images_per_sec", title="Pace", y_label="images per second")


@dataclass(frozen=True, kw_only=True)
class Distances:
    """A run's Frechet distances of one measure."""

    metric: Metric

    num_samples: int | None

    records: tuple[dict[str, Any], ...]
    """Validations by step; one or more."""


def distances(training: Training) -> list[Distances]:
    """Find what the run's samples were measured with."""
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for record in training.records("validation"):
        for key in record:
            if (key == "fid" or key.startswith("fd_")) and finite(record[key]) is not None:
                found.setdefault((key, record.get("num_samples")), []).append(record)
    return [
        Distances(
            metric=distance_metric(key, training.config.get("features"), max(record[key] for record in records)),
            num_samples=count if isinstance(count, int) else None,
            records=tuple(records),
        )
        for (key, count), records in found.items()
    ]


def training_panels(training: Training) -> list[Panel]:
    """Choose what to draw of a training run."""
    records = training.records("train")
    steps = [training_panel(records, quantity) for quantity in (*_losses(records), *OPTIMIZATION)]
    return [
        *(_distance_panel(item) for item in distances(training)),
        *(panel for panel in steps if panel is not None),
        *_pace(records),
    ]


def draw_training(training: Training) -> Figure:
    """Draw all panels of a run as one figure, for papers."""
    return draw_panels(training_panels(training))


def _distance_panel(found: Distances) -> Panel:
    metric = found.metric
    series = read_series(found.records, metric.key)
    assert series is not None  # they are finite
    first, last = float(series.values[0]), float(series.values[-1])
    return Panel(
        title=f"{metric.label} {metric.arrow}",
        summary=metric.show(last) if len(series.values) == 1 else f"{metric.show(first)} → {metric.show(last)}",
        y_label=f"of {found.num_samples:,} samples" if found.num_samples is not None else metric.label,
        series=(series,),
    )


def _losses(records: Sequence[dict[str, Any]]) -> list[Quantity]:
    """The loss and its parts; one that is all of the loss names the loss's axis instead of being drawn twice."""
    keys = dict.fromkeys(key for record in records for key, value in record.items() if finite(value) is not None)
    parts = [key for key in keys if key not in NO_LOSSES]
    whole = [key for key in parts if all(record.get(key) == record.get("loss") for record in records)]
    axis = PARTS[whole[0]][1] if whole and whole[0] in PARTS else "loss"
    quantities = [Quantity(key="loss", title="Loss", y_label=axis)]
    for key in parts:
        if key not in whole:
            title, axis = PARTS.get(key, (key.replace("_", " ").capitalize(), "loss"))
            quantities.append(Quantity(key=key, title=title, y_label=axis))
    return quantities


def _pace(records: Sequence[dict[str, Any]]) -> list[Panel]:
    panel = training_panel(records, PACE)
    if panel is None:
        return []
    return [replace(panel, summary=f"median {short_number(float(np.median(panel.series[0].values)))}")]
