"""What a run tells: its journal, a JSON record for each logged step; its environment; its progress on the terminal."""

import functools
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from eqvae.artifacts.files import check_still_there, read_journal, to_plain, write_json, write_text
from eqvae.artifacts.names import ENVIRONMENT, JOURNAL
from eqvae.artifacts.parsing import without_not_finite


class Journal:
    """Appends records to `journal.jsonl`; a killed process loses none, a power cut may lose the last ones."""

    def __init__(self, folder: Path, *, keep_up_to_step: int | None = None) -> None:
        """Open a run's journal, without what a killed session wrote after the step from which it goes on.

        Args:
            folder: The run's folder.
            keep_up_to_step: The step; 0 keeps nothing, as a run that begins writes all of it again.
        """
        self._path = folder / JOURNAL
        if keep_up_to_step is not None and self._path.exists():
            written = read_journal(folder) if keep_up_to_step > 0 else []
            kept = [record for record in written if record.get("step", 0) <= keep_up_to_step]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            write_text(self._path, text)

        self._ends_torn = _ends_torn(self._path)

    def write(self, kind: str, **record: Any) -> None:
        check_still_there(self._path)
        line = json.dumps(without_not_finite({"kind": kind, **to_plain(record)}), allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._ends_torn else "") + line + "\n")
        self._ends_torn = False


def _ends_torn(path: Path) -> bool:
    """Whether a killed process left half a line."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


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


class Progress:
    """Shows how far long work has come, on standard error: a bar on a terminal, plain lines when piped."""

    def __init__(self, title: str, *, total: int, start: int = 0, unit: str = "step", every_sec: float = 15.0) -> None:
        self._title, self._total, self._start, self._unit, self._every_sec = title, total, start, unit, every_sec
        self._done = start
        self._began_sec = self._last_sec = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=title, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int = 1, **figures: float) -> None:
        """Say that more is done."""
        self._done += units
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
            self._bar.update(units)
            return
        now_sec = time.monotonic()
        if self._done >= self._total or now_sec - self._last_sec >= self._every_sec:
            self._last_sec = now_sec
            self._print_line(now_sec - self._began_sec, figures)

    def _print_line(self, elapsed_sec: float, figures: dict[str, float]) -> None:
        rate = (self._done - self._start) / max(elapsed_sec, 1e-9)
        left_sec = (self._total - self._done) / max(rate, 1e-9)
        shown = "".join(f", {name} {value:.4g}" for name, value in figures.items())
        done = f"{self._title}: {self._done}/{self._total} {self._unit}s, {rate:.3g} {self._unit}s/s"
        print(f"{done}, {left_sec:.0f} s left{shown}", file=sys.stderr, flush=True)  # noqa: T201


def say(text: str) -> None:
    """Print a line without tearing a bar."""
    tqdm.write(text, file=sys.stderr)


@functools.cache
def say_once(text: str) -> None:
    """Print a line that several parts of a run, or several processes, would say."""
    if os.environ.get("RANK", "0") == "0":
        say(text)
