"""`eqvae rank`'s page: contestants by the distance of their generators' samples, and which measures would have told."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from eqvae.artifacts.files import write_json, write_text
from eqvae.drawing.tables import MISSING, markdown_table
from eqvae.evidence.intervals import Difference
from eqvae.paper.cells import Cell
from eqvae.paper.plan import PlannedRun

RANKING = "ranking"
"""`ranking.md` and `ranking.json`."""

NONE, PLAIN = "none", "plain"
"""The base itself, and Equation 1: arms of every ranking of methods."""

_PREDICTORS = (
    ("equivariance_error_rotation", 3), ("equivariance_error_scale", 3), ("intrinsic_dimension", 1),
    ("spectrum_excess_db", 2), ("ifid", 2), ("ifd_", 2), ("rfid", 3), ("rfd_", 3), ("psnr_db", 2), ("lpips", 3),
    ("perceptual_", 3), ("latent_std", 3), ("token_agreement_rotation", 3), ("token_agreement_scale", 3),
    ("codebook_perplexity", 1),
)  # fmt: skip
"""Keys of an evaluation, or how those begin that end in the features' name, and digits."""

_RECONSTRUCTION = ("rfid", "rfd_", "lpips", "perceptual_", "psnr_db")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One autoencoder of a ranking, or one method, with the autoencoders that it gives."""

    name: str

    distance: Cell
    """Of its generators' samples, by seed."""

    evaluations: tuple[PlannedRun, ...]
    """One for each autoencoder."""

    method: str | None = None
    """The mixture with all its parameters; None for an autoencoder as it is."""

    equal: "Contestant | None" = None
    """The same with decoders that were trained further, for equal reconstruction."""

    decoders: tuple[PlannedRun, ...] = ()
    """Of `equal`: the runs that trained them; none for what is not fine-tuned."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All that is measured of it, in the order in which it is wanted."""
        measured = Cell(runs=self.evaluations, key="psnr_db", num_autoencoders=len(self.evaluations))
        return (measured, self.distance)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What has been measured of a contestant."""

    autoencoder: str
    """Its name, or the method as it was given."""

    method: str | None

    distance: float | None
    """Mean over seeds; None while no generator is trained."""

    values: tuple[float, ...]
    """By seed."""

    against_best: Difference | None
    """Over the seeds that both have; None for the best itself."""

    against_plain: Difference | None
    """The same against Equation 1 where it is among them."""

    predictors: Mapping[str, float]
    """Measures that need no generator, means over autoencoders."""

    decoder_steps: tuple[int, ...] = ()
    """At equal reconstruction: how far each decoder went on."""

    shortfalls_db: tuple[float, ...] = ()
    """How much of the base's PSNR was missing then."""


def write_ranking(contestants: Sequence[Contestant], root: Path, *, metric: str, scale: str) -> None:
    """Write `ranking.md` and `ranking.json`."""
    ranking, found = order(contestants), []
    measured = [each for each in ranking if each.distance is not None]
    if measured:
        shared = set.intersection(*(set(each.predictors) for each in measured))
        found = correlations(
            [each.distance for each in measured if each.distance is not None],
            {key: [each.predictors[key] for each in measured] for key in measured[0].predictors if key in shared},
        )
    record: dict[str, Any] = {"metric": metric, "scale": scale, "ranking": ranking, "correlations": found}
    lines = _ranking_lines(ranking, found, metric, scale)
    if equal := [each.equal for each in contestants if each.equal is not None]:
        record["equal_reconstruction"] = order(equal)
        lines += _equal_lines(record["equal_reconstruction"], metric)
    write_json(root / f"{RANKING}.json", record)
    write_text(root / f"{RANKING}.md", "\n".join(lines) + "\n")


def order(contestants: Sequence[Contestant]) -> list[Ranked]:
    """Put the best first, and those that are not measured yet last."""
    measured = [(each, tuple(each.distance.values())) for each in contestants]
    ordered = sorted(measured, key=lambda item: float(np.mean(item[1])) if item[1] else math.inf)
    best = ordered[0][0].distance
    plain = next((each.distance for each in contestants if each.name == PLAIN and each.method is not None), None)
    decoders = {each.name: [run.figures() for run in each.decoders if run.is_finished] for each in contestants}
    return [
        Ranked(
            autoencoder=each.name,
            method=each.method,
            distance=float(np.mean(values)) if values else None,
            values=values,
            against_best=each.distance.difference_from(best) if place > 0 else None,
            against_plain=None if plain in (None, each.distance) else each.distance.difference_from(plain),
            predictors=_mean_predictors([run.figures() for run in each.evaluations if run.is_finished]),
            decoder_steps=tuple(figures["num_steps"] for figures in decoders[each.name]),
            shortfalls_db=tuple(figures["shortfall_db"] for figures in decoders[each.name]),
        )
        for place, (each, values) in enumerate(ordered)
    ]


def _mean_predictors(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = [predictors(metrics) for metrics in evaluations]
    keys = [key for key in found[0] if all(key in each for each in found)] if found else []
    return {key: float(np.mean([each[key] for each in found])) for key in keys}


def predictors(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Pick the measures that need no generator; those of single transformations are none."""
    keys = [key for key, value in metrics.items() if isinstance(value, int | float)]
    of_all = [key for key in keys if "_rotation" not in key and "_scale" not in key]
    found: list[str] = []
    for wanted, _ in _PREDICTORS:
        found += [key for key in of_all if key.startswith(wanted)] if wanted.endswith("_") else {wanted} & {*keys}
    return {key: float(metrics[key]) for key in found}


def correlations(distances: Sequence[float], measures: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Correlate the ranks of each measure with those of the distance: do both order the autoencoders alike?

    Positive where a smaller measure goes with a better generator. The p-value is that of Kendall's tau against no
    association, exact for few autoencoders without ties.
    """
    if len(distances) < 3 or len(set(distances)) == 1:
        return []
    found = []
    for name, values in measures.items():
        if len(set(values)) > 1:
            spearman, kendall = stats.spearmanr(values, distances), stats.kendalltau(values, distances)
            found.append(
                {
                    "measure": name,
                    "num_autoencoders": len(values),
                    "spearman": float(spearman.statistic),
                    "kendall": float(kendall.statistic),
                    "p_value": float(kendall.pvalue),
                }
            )
    return sorted(found, key=lambda each: -abs(each["spearman"]))


def _ranking_lines(ranking: Sequence[Ranked], found: Sequence[Mapping[str, Any]], metric: str, scale: str) -> list[str]:
    is_of_methods = any(each.method is not None for each in ranking)
    what = "The same base, data, steps, batch, seeds and generator" if is_of_methods else "The same generator, budget"
    lines = [
        "# Methods by the generators of their latents" if is_of_methods else "# Autoencoders by their generators",
        "",
        f"{what}{'' if is_of_methods else ', seeds'} and normalization for each; scale `{scale}`. g{metric}: lower is "
        "better.",
        "",
        _table(ranking, metric, [name for name, _ in _PREDICTORS]),
        "",
        "Intervals: 95%, by the seeds. Two whose interval holds 0 are not told apart.",
        "",
    ]
    if is_of_methods:
        lines += [f"- `{each.autoencoder}`: `{each.method}`" for each in ranking if each.method is not None]
        lines += [f"- `{NONE}`: the base itself", ""]
    if not found:
        return [*lines, "Rank correlations need three autoencoders or more."]
    names = ["measure without a generator", "Spearman", "Kendall", f"p (n = {found[0]['num_autoencoders']})"]
    layout = {"spearman": "+.2f", "kendall": "+.2f", "p_value": ".2f"}
    rows = [[each["measure"], *(format(each[name], digits) for name, digits in layout.items())] for each in found]
    return [*lines, markdown_table(names, rows)]


def _equal_lines(ranking: Sequence[Ranked], metric: str) -> list[str]:
    """Say what is left of the order where all decoders reconstruct as well as the base."""
    lines = [
        "",
        "## At equal reconstruction",
        "",
        "Decoders went on alone, by Equation 1, until PSNR was the base's on the validation images, or to the limit; "
        "the generators are the same, and their pictures are drawn anew.",
        "",
        _table(ranking, metric, _RECONSTRUCTION, has_decoders=True),
        "",
    ]
    short = [each for each in ranking if max(each.shortfalls_db, default=0.0) > 0]
    return [
        *lines,
        *(f"- `{each.autoencoder}` misses {_mean(each.shortfalls_db, 2)} dB at the limit." for each in short),
    ]


def _table(ranking: Sequence[Ranked], metric: str, wanted: Sequence[str], *, has_decoders: bool = False) -> str:
    keys = list(dict.fromkeys(key for each in ranking for key in each.predictors))
    keys = [key for key in keys if key.startswith(tuple(wanted))]
    digits = {key: next(digits for name, digits in _PREDICTORS if key.startswith(name)) for key in keys}
    has_plain = any(each.against_plain is not None for each in ranking)
    is_of_methods = any(each.method is not None for each in ranking)
    names = ["", "method" if is_of_methods else "autoencoder", f"g{metric}", "± (seeds)", "against the best"]
    names += ["against plain"] if has_plain else []
    names += ["decoder's steps", "PSNR missing, dB"] if has_decoders else []
    rows = []
    for place, each in enumerate(ranking, start=1):
        spread = f"{np.std(each.values, ddof=1):.2f} " if len(each.values) > 1 else ""
        entries = [MISSING if each.distance is None else f"{each.distance:.2f}", f"{spread}({len(each.values)})"]
        entries += [_interval(each.against_best)]
        entries += [_interval(each.against_plain)] if has_plain else []
        entries += [_mean(each.decoder_steps, 0), _mean(each.shortfalls_db, 2)] if has_decoders else []
        entries += [f"{each.predictors[key]:.{digits[key]}f}" if key in each.predictors else MISSING for key in keys]
        rows.append([str(place), each.autoencoder, *entries])
    return markdown_table([*names, *keys], rows, num_text_columns=2)


def _mean(values: Sequence[int | float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" if values else MISSING


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return MISSING
    if difference.interval is None:
        return f"{difference.difference:+.2f}"
    low, high = difference.interval.low or 0.0, difference.interval.high or 0.0
    return f"{difference.difference:+.2f} ({low:+.2f} to {high:+.2f})"
