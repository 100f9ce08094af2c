"""What `make faults` counts: every test of a fault adds to a record, which is written as JSON at the end."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "faults"


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Figures of a file's tests; those of a full run, or of its parts, go to docs/results/faults/NAME.json."""
    found: dict[str, Any] = {}
    began_sec = time.monotonic()
    yield found
    is_full_run = request.config.getoption("markexpr") == "faults"
    if not found or not is_full_run:
        return
    commit = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("commit") != commit.stdout.strip():  # else parts of it were run before
        record = {"duration_sec": 0.0}
    record |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "duration_sec": round(record["duration_sec"] + time.monotonic() - began_sec, 1),
    }
    for fault, figures in found.items():
        record[fault] = {**record.get(fault, {}), **figures} if isinstance(figures, dict) else figures
    path.write_text(json.dumps(record, indent=2) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out of `-m "slow or not slow"` too: they are run where they are named."""
    if "faults" not in config.getoption("markexpr"):
        items[:] = [item for item in items if item.get_closest_marker("faults") is None]
