"""What the pages promise of memory and of long runs holds in the figures that the benchmarks wrote."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(name: str) -> list[dict[str, Any]]:
    return json.loads((DOCS / "results" / "benchmarks" / f"{name}.json").read_text())["rows"]


def test_memory_is_predicted_within_15_percent():
    assert [row["case"] for row in rows("memory") if row["ratio"] != pytest.approx(1.0, abs=0.15)] == []
    counts = Counter(row["case"].split()[0] for row in rows("memory"))
    assert counts.keys() == {"finetune", "train", "sample"}
    assert min(counts.values()) >= 3


def test_long_runs_stay_as_they_begin():
    for row in rows("long_run"):
        assert row["throughput_ratio"] >= 0.97
        assert row["resident_ratio"] <= 1.02
        assert row["at_10000"]["weights_mib"] <= 1.2 * row["at_1000"]["weights_mib"]  # the first export comes between
        assert row["num_checkpoints"] == 2 + 3  # the last two, and `--keep-last 3`
        assert (row["num_steps_recorded"], row["num_other_records"] < 20) == (1050, True)


def test_the_page_shows_all_of_them():
    specification = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert specification is not None and specification.loader is not None
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    page = hooks.on_page_markdown((DOCS / "scale.md").read_text())
    assert all(f"| {row['case']} |" in page for row in rows("memory") + rows("long_run"))
