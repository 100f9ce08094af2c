"""What a plan's runs show, as text and JSON: tables and figures, with whatever is measured so far."""

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eqvae.artifacts.files import write_json, write_text
from eqvae.artifacts.names import ENVIRONMENT
from eqvae.drawing.tables import MISSING, markdown_table, with_minus_sign
from eqvae.evidence.curves import read_if_there
from eqvae.evidence.intervals import Difference
from eqvae.paper.cells import Cell, Row, TableItem
from eqvae.paper.figures import FigureItem
from eqvae.paper.headline import HeadlineItem
from eqvae.paper.plan import Plan

_COMPARED = ("gfid", "gkid", "gfid_fixed", "fid", "kid", "fid_watch", "kid_watch")
"""Columns whose differences between rows get an interval: those with seeds."""


def write_item(item: TableItem | FigureItem | HeadlineItem, root: Path) -> list[Path]:
    """Write ITEM.md, ITEM.json where it has figures, and pictures once their runs are finished."""
    if isinstance(item, HeadlineItem):
        return item.write(root)
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
    write_text(written[0], "\n".join(lines) + "\n")
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


def _difference(table: TableItem, row: Row, key: str, against: str) -> Difference | None:
    """Compare a row's figure with that of another row."""
    other = next((each for each in table.rows if each.label == against), None)
    if other is None or key not in _COMPARED or key not in row.cells or key not in other.cells:
        return None
    return row.cells[key].difference_from(other.cells[key])


def _share_of_gain(table: TableItem, row: Row, key: str) -> float | None:
    """How much of the way between two rows this one goes, by their means; none where there is no way."""
    if table.gain is None or key not in _COMPARED:
        return None
    ends = [next(each for each in table.rows if each.label == label) for label in table.gain]
    cells = [each.cells.get(key) for each in (*ends, row)]
    means = [float(np.mean(values)) for cell in cells if cell is not None and (values := cell.values())]
    if row in ends or len(means) < len(cells) or means[0] == means[1]:
        return None
    return (means[2] - means[0]) / (means[1] - means[0])


def _difference_lines(table: TableItem) -> Iterator[str]:
    for column, row in itertools.product(table.columns, table.rows):
        if (share := _share_of_gain(table, row, column.key)) is not None:
            whole = " to ".join(table.gain or ())
            yield f"- {column.here}: {row.label} has {_number(share, 2)} of the gain, that of {whole}"
    for column, row, is_second in itertools.product(table.columns, table.rows, (False, True)):
        against = row.also_against if is_second else row.against
        if (found := _difference(table, row, column.key, against)) is None:
            continue
        line = f"- {column.here}: {row.label} against {against}: {_number(found.difference, column.digits, '+')}"
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
                "also_against": row.also_against,
                "figures": {
                    column.key: _figure(row.expected.get(column.key), row.cells.get(column.key))
                    | {
                        "difference": _difference(table, row, column.key, row.against),
                        "second_difference": _difference(table, row, column.key, row.also_against),
                        "share_of_gain": _share_of_gain(table, row, column.key),
                    }
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
