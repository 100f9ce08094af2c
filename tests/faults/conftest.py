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


@pytest.fixture
def counts(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Figures of a test, by fault and by what it struck; those of `-m faults` go to docs/results/faults/FILE.json.

    Each entry has its own time and commit, so that a set that was stopped can be gone on with.
    """
    found: dict[str, Any] = {}
    began_sec = time.monotonic()
    yield found
    if not found or request.config.getoption("markexpr") != "faults":
        return
    commit, changes = (
        subprocess.run(["git", *question], cwd=RESULTS.parents[2], capture_output=True, text=True).stdout.strip()
        for question in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", "src", "tests"))
    )
    origin = {
        "sec": round(time.monotonic() - began_sec, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + ("-dirty" if changes else ""),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{request.module.__name__.rpartition('.')[2].removeprefix('test_')}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for fault, struck in found.items():
        record.setdefault(fault, {}).update({what: figures | origin for what, figures in struck.items()})
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out of `-m "slow or not slow"` too: they are run where they are named."""
    if "faults" not in config.getoption("markexpr"):
        items[:] = [item for item in items if item.get_closest_marker("faults") is None]
