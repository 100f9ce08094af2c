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

NUM_KILLS = int(os.environ.get("EQVAE_KILLS", "50"))
"""Kills of each command in a full run."""


@pytest.fixture(scope="module")
def counts(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Figures of a file's tests; those of a full run (`make faults`) go to docs/results/faults/NAME.json."""
    found: dict[str, Any] = {}
    began_sec = time.monotonic()
    yield found
    is_full_run = request.config.getoption("markexpr") == "faults"
    if not found or not is_full_run:
        return
    commit = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12"], cwd=RESULTS.parent, capture_output=True, text=True
    )
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "duration_sec": round(time.monotonic() - began_sec, 1),
        **found,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out of `-m "slow or not slow"` too: they are run where they are named."""
    if "faults" not in config.getoption("markexpr"):
        items[:] = [item for item in items if item.get_closest_marker("faults") is None]
