"""The tables of docs/results/benchmarks/README.md, each from the figures that lie beside it."""

import json
import re
from pathlib import Path

from benchmarks import growth, harness
from benchmarks.machine import ROOT

PAGE = ROOT / "docs" / "results" / "benchmarks" / "README.md"
MARK = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)


def write_tables(page: Path = PAGE) -> None:
    """Write each table between its marks again."""
    text = page.read_text()
    page.write_text(MARK.sub(lambda match: block(page.parent / match[1]), text))


def block(path: Path) -> str:
    """Format a file of figures: command, machine, table."""
    figures = json.loads(path.read_text())
    machine = figures["machine"]
    where = f"{figures['date']}, {machine['cpu']}"
    if machine["device"] != machine["cpu"]:
        where += f", {machine['device']}"
    where += f", {machine['num_threads']} threads, load {machine['load_average']:.1f}, PyTorch "
    where += f"{figures['versions']['torch']}, commit {figures['commit']}."
    table = growth.table if figures["benchmark"] == "growth" else harness.table
    return f"<!-- {path.name} -->\n    {figures['command']}\n\n{where}\n\n{table(figures)}\n<!-- end -->"
