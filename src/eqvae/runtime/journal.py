"""The journal of a run: one JSON record for each logged step, and the environment that it ran in."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eqvae.artifacts import ENVIRONMENT, JOURNAL, read_journal, to_plain, write_atomically, write_json


class Journal:
    """Appends records to `journal.jsonl`; a killed process loses none, a power cut may lose the last ones."""

    def __init__(self, folder: Path, *, keep_up_to_step: int | None = None) -> None:
        """Open a run's journal."""
        self._path = folder / JOURNAL
        if keep_up_to_step is not None and self._path.exists():
            kept = [record for record in read_journal(folder) if record.get("step", 0) <= keep_up_to_step]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            write_atomically(self._path, lambda temporary: temporary.write_text(text))

    def write(self, kind: str, **record: Any) -> None:
        """Append one record."""
        line = json.dumps({"kind": kind, **to_plain(record)})
        with self._path.open("a") as file:
            file.write(line + "\n")


def write_environment(folder: Path, *, device: torch.device, seed: int | None, num_processes: int = 1) -> None:
    """Write `environment.json`: versions, device, processes, commit, date, seed."""
    write_json(
        folder / ENVIRONMENT,
        {
            "eqvae": installed_version("eqvae"),
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("torch", "torchvision", "diffusers", "timm", "torchmetrics")},
            "device": device_name(device),
            "num_processes": num_processes,
            "num_threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "command": ["eqvae", *sys.argv[1:]],
            "seed": seed,
        },
    )


def installed_version(package: str) -> str | None:
    """Look up the installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Name a device for a record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({_processor()}, {torch.get_num_threads()} threads)"


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Find the commit of the checkout that this package is run from; None for an installed package."""
    source = Path(__file__).resolve().parents[2]
    # An installed package may lie in a virtual environment inside another project's checkout.
    if source.name != "src" or _ask_git(source, "rev-parse", "--show-toplevel") != str(source.parent):
        return None
    return _ask_git(source, "describe", "--always", "--dirty", "--abbrev=12")


def _ask_git(folder: Path, *question: str) -> str | None:
    try:
        answer = subprocess.run(["git", *question], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
