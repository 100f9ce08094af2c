"""Reproduced tables as text and JSON: for each measure the paper's figure, ours, and the spread over seeds."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqvae.artifacts import ENVIRONMENT, write_atomically, write_json
from eqvae.evidence.curves import read_if_there
from eqvae.evidence.intervals import Difference
from eqvae.paper.figures import PaperFigure
from eqvae.paper.planned import Plan, PlannedRun
from eqvae.paper.table import Cell, Column, Row, Table
from eqvae.report.tables import MISSING, markdown_table, with_minus_sign

_COMPARED = ("gfid", "gfid_fixed", "fid", "fid_watch")
"""Columns whose differences between rows get an interval: those with seeds."""


def write_table(table: Table, root: Path) -> list[Path]:
    """Write ITEM.md and ITEM.json with whatever is measured so far."""
    markdown, record = root / f"{table.item}.md", root / f"{table.item}.json"
    write_json(record, _record(table, root))
    text = "\n".join([*_head(table.item, table.title, table.source, table.scale, table.runs, root), *_body(table)])
    write_atomically(markdown, lambda temporary: temporary.write_text(text + "\n"))
    return [markdown, record]


def write_figure(figure: PaperFigure, root: Path) -> list[Path]:
    """Draw a figure once its runs are finished, and write ITEM.md that shows it; its table is written at any time."""
    drawn = figure.draw(root / figure.item) if all(run.is_finished for run in figure.runs) else []
    lines = _head(figure.item, figure.title, figure.source, figure.scale, figure.runs, root)
    for file in drawn:
        if file.suffix == ".png":
            lines += [f"![{file.stem}]({file.relative_to(root)})", ""]
    written = list(drawn)
    if figure.table is not None:
        lines += _body(figure.table)
        write_json(root / f"{figure.item}.json", _record(figure.table, root))
        written.append(root / f"{figure.item}.json")
    markdown = root / f"{figure.item}.md"
    write_atomically(markdown, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))
    return [markdown, *written]


def difference(table: Table, row: Row, key: str) -> Difference | None:
    """Compare a row's figure with that of the row beside which the paper sets it."""
    other = next((each for each in table.rows if each.label == row.against), None)
    if other is None or key not in row.cells or key not in other.cells:
        return None
    return row.cells[key].difference_from(other.cells[key])


def _head(item: str, title: str, source: str, scale: str, runs: Sequence[PlannedRun], root: Path) -> list[str]:
    """Title, state and origin."""
    number = item.replace("table", "Table ").replace("figure", "Figure ")
    num_finished, num_runs = _count(runs)
    state = "" if num_finished == num_runs else f" {num_finished} of {num_runs} runs are finished."
    lines = [f"# {number}: {title}", "", f"Expected figures: {source}. Ours: scale `{scale}`.{state}", ""]
    environment = read_if_there(root / ENVIRONMENT)
    if environment:
        command = shlex.join(map(str, environment.get("command", [])))
        commit, date = environment.get("commit") or "unknown", str(environment.get("date", ""))[:10]
        lines += [f"`{command}`, commit {commit}, {environment.get('device', '')}, {date}.", ""]
    return lines


def _count(runs: Sequence[PlannedRun]) -> tuple[int, int]:
    """Of the runs and all that they need: how many are finished, and how many there are."""
    plan = Plan.of(runs)
    return len(plan.runs) - len(plan.unfinished), len(plan.runs)


def _body(table: Table) -> list[str]:
    """The table, its differences and notes."""
    names = ["", "here"]
    measured = {key for row in table.rows for key in row.cells}
    for column in table.columns:
        names += [f"paper: {column.paper} {column.arrow}".rstrip()] if column.paper else []
        names += [f"{column.here} {column.arrow}".rstrip(), "±"] if column.key in measured else []
    rows = []
    for row in table.rows:
        entries = [row.label, row.here or MISSING]
        for column in table.columns:
            entries += _paper_entry(row, column) + (_own_entries(row, column) if column.key in measured else [])
        rows.append(entries)
    lines = [markdown_table(names, rows, num_text_columns=2), ""]
    lines += [f"± is the standard deviation over seeds, their number in brackets; {MISSING} is not measured.", ""]
    lines += [f"{note}\n" for note in table.notes]
    compared = _differences(table)
    if compared:
        lines += ["Differences (95% interval by the paired t distribution over seeds):", "", *compared]
    return lines


def _paper_entry(row: Row, column: Column) -> list[str]:
    """The paper's figure; nothing where the column is ours alone."""
    expected = row.expected.get(column.key)
    if not column.paper:
        return []
    return [MISSING if expected is None else f"{expected:.{column.paper_digits}f}"]


def _own_entries(row: Row, column: Column) -> list[str]:
    """Our mean and its spread."""
    values = row.cells[column.key].values() if column.key in row.cells else []
    if not values:
        return [MISSING, MISSING]
    spread = _spread(values)
    shown = "" if spread is None else f"{spread:.{column.digits}f} "
    return [_number(float(np.mean(values)), column.digits), f"{shown}({len(values)})"]


def _differences(table: Table) -> list[str]:
    lines = []
    for column in table.columns:
        for row in table.rows if column.key in _COMPARED else ():
            found = difference(table, row, column.key)
            if found is None:
                continue
            line = (
                f"- {column.here}: {row.label} against {row.against}: {_number(found.difference, column.digits, '+')}"
            )
            if found.interval is None:
                line += ", one seed: no interval"
            else:
                low, high = found.interval.low or 0.0, found.interval.high or 0.0
                line += f" ({_number(low, column.digits, '+')} to {_number(high, column.digits, '+')})"
                is_better = (found.difference < 0) == (column.better == "lower")
                line += f", {'better' if is_better else 'worse'}" if found.shown else ", not shown at this scale"
            lines.append(line)
    return lines


def _record(table: Table, root: Path) -> dict[str, Any]:
    """All that the text says and what is behind it."""
    num_finished, num_runs = _count(table.runs)
    return {
        "item": table.item,
        "title": table.title,
        "source": table.source,
        "scale": table.scale,
        "num_runs": num_runs,
        "num_finished": num_finished,
        "columns": table.columns,
        "rows": [
            {
                "label": row.label,
                "here": row.here,
                "against": row.against,
                "figures": {
                    column.key: _figure(row.expected.get(column.key), row.cells.get(column.key))
                    | {"difference": difference(table, row, column.key) if column.key in _COMPARED else None}
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
        "spread": _spread(values),
        "num_seeds": len(values),
        "values": values,
        "metric": None if cell is None else cell.key,
        "step": None if cell is None else cell.step,
        "runs": [] if cell is None else [run.name for run in cell.runs],
    }


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _number(value: float, digits: int, sign: str = "") -> str:
    return with_minus_sign(f"{value:{sign}.{digits}f}")
