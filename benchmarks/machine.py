"""What benchmarks share: a description of the machine (never its name), memory, a process for each variant."""

import json
import os
import platform
import resource
import subprocess
import sys
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


def peak_mib(device: torch.device) -> float:
    """Read the most memory so far: PyTorch's on a CUDA device, else the process's.

    Args:
        device: Where the benchmark computes.

    Returns:
        MiB.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would still show what the calling process had used
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_apart(script: str, variant: str, options: Any, passed_on: Collection[str]) -> dict[str, Any]:
    """Let a benchmark call itself with `--measure VARIANT`, so that each variant has a process of its own.

    Args:
        script: Its file, `__file__`.
        variant: What to measure.
        options: As given to the command; one of them is `threads`.
        passed_on: Those that matter to a variant.

    Returns:
        What the process prints as its last line.

    Raises:
        SystemExit: If it fails.
    """
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in passed_on]
    command = [sys.executable, script, f"--measure={variant}", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"'{variant}' failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
