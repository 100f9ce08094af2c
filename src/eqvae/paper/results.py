"""What a plan's runs show, as text and JSON: tables, figures, a ranking, with whatever is measured so far."""

import itertools
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from eqvae.artifacts.files import write_atomically, write_json
from eqvae.artifacts.names import ENVIRONMENT
from eqvae.drawing.tables import MISSING, markdown_table, with_minus_sign
from eqvae.evidence.curves import read_if_there
from eqvae.evidence.intervals import Difference
from eqvae.paper.cells import Cell, Row, TableItem
from eqvae.paper.figures import FigureItem
from eqvae.paper.plan import Plan, PlannedRun

_COMPARED = ("gfid", "gkid", "gfid_fixed", "fid", "kid", "fid_watch", "kid_watch")
"""Columns whose differences between rows get an interval: those with seeds."""

RANKING = "ranking"
"""`ranking.md` and `ranking.json`."""

_PREDICTORS = (
    ("equivariance_error_rotation", 3), ("equivariance_error_scale", 3), ("intrinsic_dimension", 1),
    ("spectrum_excess_db", 2), ("ifid", 2), ("ifd_", 2), ("rfid", 3), ("rfd_", 3), ("psnr_db", 2), ("latent_std", 3),
    ("token_agreement_rotation", 3), ("token_agreement_scale", 3), ("codebook_perplexity", 1),
)  # fmt: skip
"""Keys of an evaluation, or how those begin that end in the features' name, and digits."""


def write_item(item: TableItem | FigureItem, root: Path) -> list[Path]:
    """Write ITEM.md, ITEM.json where it has figures, and pictures once their runs are finished."""
    plan = Plan.of(item.runs)
    table = item if isinstance(item, TableItem) else item.table
    lines, written = _head(item, plan, root), [root / f"{item.item}.md"]
    if isinstance(item, FigureItem) and not plan.unfinished:
        written += item.draw(root / item.item)
        lines += [f"![{file.stem}]({file.relative_to(root)})\n" for file in written if file.suffix == ".png"]
    if table is not None:
        written.append(root / f"{item.item}.json")
        write_json(written[-1], _record(table, plan, root))
        lines += _body(table)
    _write_text(written[0], lines)
    return written


def _head(item: TableItem | FigureItem, plan: Plan, root: Path) -> list[str]:
    """Title, state and origin."""
    number = item.item.replace("table", "Table ").replace("figure", "Figure ")
    num_left, num_runs = len(plan.unfinished), len(plan.runs)
    state = f" {num_runs - num_left} of {num_runs} runs are finished." if num_left else ""
    lines = [
        f"# {number}: {item.title}",
        "",
        f"Expected figures: {item.source}. Ours: scale `{item.scale}`.{state}",
        "",
    ]
    environment = read_if_there(root / ENVIRONMENT)
    if environment:
        command = shlex.join(map(str, environment.get("command", [])))
        commit, date = environment.get("commit") or "unknown", str(environment.get("date", ""))[:10]
        lines += [f"`{command}`, commit {commit}, {environment.get('device', '')}, {date}.", ""]
    return lines


def _body(table: TableItem) -> list[str]:
    """The table, its differences and notes."""
    names = ["", "here"]
    measured = {key for row in table.rows for key in row.cells}
    for column in table.columns:
        names += [f"paper: {column.paper} {column.arrow}".rstrip()] if column.paper else []
        names += [f"{column.here} {column.arrow}".rstrip(), "±"] if column.key in measured else []
    rows = []
    for row in table.rows:
        rows.append([row.label, row.here or MISSING])
        for column in table.columns:
            expected = row.expected.get(column.key)
            if column.paper:
                rows[-1].append(MISSING if expected is None else f"{expected:.{column.paper_digits}f}")
            if column.key in measured:
                rows[-1] += _own_entries(row.cells.get(column.key), column.digits)
    lines = [markdown_table(names, rows, num_text_columns=2), ""]
    lines += [f"± is the standard deviation over seeds, their number in brackets; {MISSING} is not measured.", ""]
    lines += [f"{note}\n" for note in table.notes]
    if compared := list(_difference_lines(table)):
        has_twins = any(cell.num_autoencoders > 1 for row in table.rows for cell in row.cells.values())
        how = "a nested analysis of variance of fine-tunings and" if has_twins else "the paired t distribution over"
        lines += [f"Differences (95% interval by {how} seeds):", "", *compared]
    return lines


def _own_entries(cell: Cell | None, digits: int) -> list[str]:
    """Our mean and its spread."""
    values = [] if cell is None else cell.values()
    if not values:
        return [MISSING, MISSING]
    spread = f"{np.std(values, ddof=1):.{digits}f} " if len(values) > 1 else ""
    return [_number(float(np.mean(values)), digits), f"{spread}({len(values)})"]


def _difference(table: TableItem, row: Row, key: str) -> Difference | None:
    """Compare a row's figure with that of the row beside which the paper sets it."""
    other = next((each for each in table.rows if each.label == row.against), None)
    if other is None or key not in _COMPARED or key not in row.cells or key not in other.cells:
        return None
    return row.cells[key].difference_from(other.cells[key])


def _difference_lines(table: TableItem) -> Iterator[str]:
    for column, row in itertools.product(table.columns, table.rows):
        if (found := _difference(table, row, column.key)) is None:
            continue
        line = f"- {column.here}: {row.label} against {row.against}: {_number(found.difference, column.digits, '+')}"
        if found.interval is None:
            yield f"{line}, one seed: no interval"
            continue
        low, high = (_number(side or 0.0, column.digits, "+") for side in (found.interval.low, found.interval.high))
        is_better = (found.difference < 0) == (column.better == "lower")
        verdict = ("better" if is_better else "worse") if found.shown else "not shown at this scale"
        yield f"{line} ({low} to {high}), {verdict}"


def _record(table: TableItem, plan: Plan, root: Path) -> dict[str, Any]:
    """All that the text says and what is behind it."""
    return {
        "item": table.item,
        "title": table.title,
        "source": table.source,
        "scale": table.scale,
        "num_runs": len(plan.runs),
        "num_finished": len(plan.runs) - len(plan.unfinished),
        "columns": table.columns,
        "rows": [
            {
                "label": row.label,
                "here": row.here,
                "against": row.against,
                "figures": {
                    column.key: _figure(row.expected.get(column.key), row.cells.get(column.key))
                    | {"difference": _difference(table, row, column.key)}
                    for column in table.columns
                },
            }
            for row in table.rows
        ],
        "notes": table.notes,
        "environment": read_if_there(root / ENVIRONMENT),
    }


def _figure(expected: float | None, cell: Cell | None) -> dict[str, Any]:
    values = [] if cell is None else cell.values()
    return {
        "paper": expected,
        "here": float(np.mean(values)) if values else None,
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "num_seeds": len(values),
        "values": values,
        "metric": None if cell is None else cell.key,
        "step": None if cell is None else cell.step,
        "runs": [] if cell is None else [run.name for run in cell.runs],
    }


def _number(value: float, digits: int, sign: str = "") -> str:
    return with_minus_sign(f"{value:{sign}.{digits}f}")


def _write_text(path: Path, lines: Iterable[str]) -> None:
    write_atomically(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


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


def write_ranking(contestants: Sequence[Contestant], root: Path, *, metric: str, scale: str) -> None:
    """Write `ranking.md` and `ranking.json`."""
    ranking = order(contestants)
    measured = [each for each in ranking if each.distance is not None]
    shared = set.intersection(*(set(each.predictors) for each in ranking))
    found = correlations(
        [each.distance for each in measured if each.distance is not None],
        {key: [each.predictors[key] for each in measured] for key in ranking[0].predictors if key in shared},
    )
    write_json(root / f"{RANKING}.json", {"metric": metric, "scale": scale, "ranking": ranking, "correlations": found})
    _write_text(root / f"{RANKING}.md", _ranking_lines(ranking, found, metric, scale))


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
    keys = list(dict.fromkeys(key for each in ranking for key in each.predictors))
    digits = {key: next(digits for name, digits in _PREDICTORS if key.startswith(name)) for key in keys}
    names = ["", "autoencoder", f"g{metric}", "± (seeds)", "against the best", *keys]
    rows = []
    for place, each in enumerate(ranking, start=1):
        spread = f"{np.std(each.values, ddof=1):.2f} " if len(each.values) > 1 else ""
        entries = [MISSING if each.distance is None else f"{each.distance:.2f}", f"{spread}({len(each.values)})"]
        entries += [_interval(each.against_best)]
        entries += [f"{each.predictors[key]:.{digits[key]}f}" if key in each.predictors else MISSING for key in keys]
        rows.append([str(place), each.autoencoder, *entries])
    lines = [
        "# Autoencoders by their generators",
        "",
        f"The same generator, budget, seeds and normalization for each; scale `{scale}`. g{metric}: lower is better.",
        "",
        markdown_table(names, rows, num_text_columns=2),
        "",
        "Intervals: 95%, paired t over seeds. Two whose interval holds 0 are not told apart.",
        "",
    ]
    if not found:
        return [*lines, "Rank correlations need three autoencoders or more."]
    names = ["measure without a generator", "Spearman", "Kendall", f"p (n = {found[0]['num_autoencoders']})"]
    layout = {"spearman": "+.2f", "kendall": "+.2f", "p_value": ".2f"}
    rows = [[each["measure"], *(format(each[name], digits) for name, digits in layout.items())] for each in found]
    return [*lines, markdown_table(names, rows)]


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return MISSING
    if difference.interval is None:
        return f"{difference.difference:+.2f}"
    low, high = difference.interval.low or 0.0, difference.interval.high or 0.0
    return f"{difference.difference:+.2f} ({low:+.2f} to {high:+.2f})"
