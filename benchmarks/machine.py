"""What a benchmark's figures depend on: machine, date, commit, versions, command; never the machine's name."""

import os
import platform
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eqvae.runtime.journal import device_name


def describe_machine(
    script: str,
    options: Any,
    *,
    device: torch.device,
    packages: tuple[str, ...],
    leave_out: Collection[str] = ("json",),
) -> dict[str, Any]:
    """Describe where and how a benchmark runs.

    Args:
        script: Its file, `__file__`.
        options: A dataclass of its flags, as given; one of them is `threads`.
        device: Where it computes.
        packages: Whose versions matter, besides torch and eqvae.
        leave_out: Flags that are not part of the command.

    Returns:
        Machine, date, commit, versions and command.
    """
    commit = git("rev-parse", "--short", "HEAD") + (
        "-dirty" if git("status", "--porcelain", "src", "benchmarks") else ""
    )
    flags = [flag for name, value in vars(options).items() if name not in leave_out for flag in _flag(name, value)]
    return {
        "machine": {
            "cpu": device_name(torch.device("cpu")),
            "device": device_name(device),
            "num_cores": os.cpu_count(),
            "num_threads": options.threads,
            "load_average": os.getloadavg()[0],
        },
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", *packages, "eqvae")},
        },
        "command": " ".join([f"python benchmarks/{Path(script).name}", *flags]),
    }


def _flag(name: str, value: object) -> list[str]:
    """Spell a flag as tyro reads it."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [] if value is None else [f"--{dashed}", str(value)]


def git(*arguments: str) -> str:
    """Ask git about the folder of this file; empty where it does not answer.

    Args:
        *arguments: The question.

    Returns:
        Its answer.
    """
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
