"""A ranking as text and JSON: distances with spread, measures that need no generator, and how far the two agree."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from eqvae.artifacts import write_atomically, write_json
from eqvae.evidence.intervals import Difference
from eqvae.paper.planned import PlannedRun
from eqvae.paper.table import Cell
from eqvae.report.tables import MISSING, markdown_table

RANKING = "ranking"
"""`ranking.md` and `ranking.json`."""

_PREDICTORS = (
    ("equivariance_error_rotation", 3), ("equivariance_error_scale", 3), ("intrinsic_dimension", 1),
    ("spectrum_excess_db", 2), ("ifid", 2), ("ifd_", 2), ("rfid", 3), ("rfd_", 3), ("psnr_db", 2), ("latent_std", 3),
    ("token_agreement_rotation", 3), ("token_agreement_scale", 3), ("codebook_perplexity", 1),
)  # fmt: skip
"""Keys of an evaluation, or how those begin that end in the features' name, and digits."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One autoencoder of a ranking."""

    name: str

    distance: Cell
    """Of its generators' samples, by seed."""

    evaluation: PlannedRun


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What has been measured of a contestant."""

    autoencoder: str

    distance: float | None
    """Mean over seeds; None while no generator is trained."""

    values: tuple[float, ...]
    """By seed."""

    against_best: Difference | None
    """Over the seeds that both have; None for the best itself."""

    predictors: Mapping[str, float]
    """Measures that need no generator."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """How far a measure without a generator orders the autoencoders as their generators do."""

    measure: str

    num_autoencoders: int

    spearman: float
    """Rank correlation with the distance, -1 ... 1: positive where a smaller measure goes with a better generator."""

    kendall: float

    p_value: float
    """Of Kendall's tau against no association; exact for few autoencoders without ties."""


def write_ranking(contestants: Sequence[Contestant], root: Path, *, metric: str, scale: str) -> None:
    """Write `ranking.md` and `ranking.json` with what is measured so far."""
    ranking = order(contestants)
    measured = [each for each in ranking if each.distance is not None]
    shared = set.intersection(*(set(each.predictors) for each in ranking))
    found = correlations(
        [each.distance for each in measured if each.distance is not None],
        {key: [each.predictors[key] for each in measured] for key in ranking[0].predictors if key in shared},
    )
    write_json(root / f"{RANKING}.json", {"metric": metric, "scale": scale, "ranking": ranking, "correlations": found})
    text = "\n".join(_markdown(ranking, found, metric, scale)) + "\n"
    write_atomically(root / f"{RANKING}.md", lambda temporary: temporary.write_text(text))


def order(contestants: Sequence[Contestant]) -> list[Ranked]:
    """Put the best first, and those that are not measured yet last."""
    measured = [(each, tuple(each.distance.values())) for each in contestants]
    ordered = sorted(measured, key=lambda item: float(np.mean(item[1])) if item[1] else math.inf)
    best = ordered[0][0].distance
    return [
        Ranked(
            autoencoder=each.name,
            distance=float(np.mean(values)) if values else None,
            values=values,
            against_best=each.distance.difference_from(best) if place > 0 else None,
            predictors=predictors(each.evaluation.figures()),
        )
        for place, (each, values) in enumerate(ordered)
    ]


def predictors(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Pick the measures that need no generator."""
    return {
        key: float(value)
        for wanted, _ in _PREDICTORS
        for key, value in metrics.items()
        if (key == wanted or (wanted.endswith("_") and key.startswith(wanted) and _is_plain(key)))
        and isinstance(value, int | float)
    }


def correlations(distances: Sequence[float], measures: Mapping[str, Sequence[float]]) -> list[Correlation]:
    """Correlate the ranks of each measure with those of the distance."""
    if len(distances) < 3 or len(set(distances)) == 1:
        return []
    found = []
    for name, values in measures.items():
        if len(set(values)) == 1:
            continue
        kendall = stats.kendalltau(values, distances)
        found.append(
            Correlation(
                measure=name,
                num_autoencoders=len(values),
                spearman=float(stats.spearmanr(values, distances).statistic),
                kendall=float(kendall.statistic),
                p_value=float(kendall.pvalue),
            )
        )
    return sorted(found, key=lambda each: -abs(each.spearman))


def _is_plain(key: str) -> bool:
    return "_rotation" not in key and "_scale" not in key


def _markdown(ranking: Sequence[Ranked], found: Sequence[Correlation], metric: str, scale: str) -> list[str]:
    keys = list(dict.fromkeys(key for each in ranking for key in each.predictors))
    digits = {key: next(digits for name, digits in _PREDICTORS if key.startswith(name)) for key in keys}
    names = ["", "autoencoder", f"g{metric}", "± (seeds)", "against the best", *keys]
    lines = [
        "# Autoencoders by their generators",
        "",
        f"The same generator, budget, seeds and normalization for each; scale `{scale}`. g{metric}: lower is better.",
        "",
    ]
    rows = []
    for place, each in enumerate(ranking, start=1):
        entries = [MISSING if each.distance is None else f"{each.distance:.2f}", _spread(each.values)]
        entries += [_interval(each.against_best)]
        entries += [f"{each.predictors[key]:.{digits[key]}f}" if key in each.predictors else MISSING for key in keys]
        rows.append([str(place), each.autoencoder, *entries])
    lines += [
        markdown_table(names, rows, num_text_columns=2),
        "",
        "Intervals: 95%, paired t over seeds. Two whose interval holds 0 are not told apart.",
        "",
    ]
    if not found:
        return [*lines, "Rank correlations need three autoencoders or more."]
    names = ["measure without a generator", "Spearman", "Kendall", f"p (n = {found[0].num_autoencoders})"]
    rows = [[each.measure, f"{each.spearman:+.2f}", f"{each.kendall:+.2f}", f"{each.p_value:.2f}"] for each in found]
    return [*lines, markdown_table(names, rows)]


def _spread(values: Sequence[float]) -> str:
    return f"{np.std(values, ddof=1):.2f} ({len(values)})" if len(values) > 1 else f"({len(values)})"


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return MISSING
    if difference.interval is None:
        return f"{difference.difference:+.2f}"
    low, high = difference.interval.low or 0.0, difference.interval.high or 0.0
    return f"{difference.difference:+.2f} ({low:+.2f} to {high:+.2f})"
