"""The machine: what it is (never its name), what it reaches at best, and what a process took of it."""

import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eqvae.runtime.device import Precision, choose_device, matrix_peak_flops_per_sec, place, synchronize
from eqvae.runtime.journal import device_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "timm", "numpy", "pillow", "eqvae")


def describe_machine(name: str, options: Any, *, leave_out: Iterable[str] = ("json",)) -> dict[str, Any]:
    """Describe where and how a benchmark runs.

    Args:
        name: Of the benchmark.
        options: A dataclass of its flags, as given; one of them is `threads`, and perhaps `device`.
        leave_out: Flags that are not part of the command.

    Returns:
        Machine, date, commit, versions and command.
    """
    changed = git("status", "--porcelain", "src", "benchmarks")
    given = {each.name: getattr(options, each.name) for each in fields(options)}
    defaults = {each.name: each.default for each in fields(options)}
    flags = [
        word
        for key, value in given.items()
        if key not in leave_out and (value != defaults[key] or key == "threads")
        for word in flag(key, value)
    ]
    device = choose_device(getattr(options, "device", "cpu"))
    return {
        "benchmark": name,
        "machine": {
            "kind": machine_kind(device),
            "cpu": device_name(torch.device("cpu")),
            "device": device_name(device),
            "num_cores": os.cpu_count(),
            "num_threads": options.threads,
            "load_average": os.getloadavg()[0],
        },
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else ""),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "command": " ".join([f"python -m benchmarks {name}", *flags]),
    }


def flag(name: str, value: object) -> list[str]:
    """Spell a flag as tyro reads it."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    if isinstance(value, tuple):
        return [f"--{dashed}", *(f"'{each}'" for each in value)] if value else []
    return [] if value is None else [f"--{dashed}", str(value)]


def machine_kind(device: torch.device) -> str:
    """Name the kind of machine that decides about speed, as in a file's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return next((kind for kind, word in (("amx", "amx_bf16"), ("avx512-bf16", "avx512_bf16")) if word in flags), "cpu")


def git(*arguments: str) -> str:
    """Ask git about this checkout; empty where it does not answer."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    ).stdout.strip()


def peak_mib(device: torch.device) -> float:
    """Read the most memory so far, in MiB: PyTorch's on a CUDA device, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would still show what the calling process had used
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches at best."""

    matrix_fp32: float
    matrix_bf16: float
    convolution_fp32: float
    convolution_bf16: float
    """Each in operations per second."""

    bytes_per_sec: float
    """Of a copy, read and written."""

    @classmethod
    def largest(cls, several: list["Peaks"]) -> "Peaks":
        """Take the best of several measurements: what else ran can only have slowed them."""
        return cls(*(max(getattr(each, key.name) for each in several) for key in fields(cls)))

    def flops_per_sec(self, precision: Precision) -> float:
        """Give the larger of matrix product and convolution."""
        if precision == "bf16":
            return max(self.matrix_bf16, self.convolution_bf16)
        return max(self.matrix_fp32, self.convolution_fp32)


def measure_peaks(device_name: str, threads: int) -> Peaks:
    """Measure matrix products, convolutions and copies.

    Args:
        device_name: Where.
        threads: Of PyTorch.

    Returns:
        The best of some repetitions each.
    """
    torch.set_num_threads(threads)
    device = choose_device(device_name)
    large = device.type == "cuda"
    matrix = [matrix_peak_flops_per_sec(device, precision) for precision in ("fp32", "bf16")]
    channels, side, images = (256, 128, 16) if large else (128, 64, 2)
    convolutions = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = place(torch.nn.Conv2d(channels, channels, 3, padding=1), device).to(dtype)
        x = torch.randn(images, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        operations = 2 * 9 * channels**2 * side**2 * images
        convolutions.append(operations / best_sec(lambda layer=layer, x=x: layer(x), device))
    source = torch.zeros((2**30 if large else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    return Peaks(*matrix, *convolutions, 2 * 4 * source.numel() / best_sec(lambda: target.copy_(source), device))


@torch.inference_mode()
def best_sec(do: Callable[[], object], device: torch.device, repetitions: int = 8) -> float:
    """Time something repeatedly, and give the shortest."""
    shortest = math.inf
    for _ in range(repetitions):
        synchronize(device)
        began_sec = time.perf_counter()
        do()
        synchronize(device)
        shortest = min(shortest, time.perf_counter() - began_sec)
    return shortest
