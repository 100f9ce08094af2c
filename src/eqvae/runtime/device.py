"""Which device computes, in which precision, and how fast it could be."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eqvae.errors import UserError
from eqvae.runtime.group_norm import speed_up_group_norms

Precision = Literal["fp32", "bf16"]
Module = TypeVar("Module", bound=nn.Module)


def choose_device(name: str = "auto") -> torch.device:
    """Resolve a device's name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("eqvae knows cpu, cuda and mps")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"device '{name}' can't be used here ({first_line})", "Try --device auto") from None
    # Convolutions in fp32 would be rounded to TF32, which has no more digits than a measure can spare.
    torch.backends.cudnn.allow_tf32 = False
    return device


def widest_float(device: torch.device) -> torch.dtype:
    """The floating-point type with the most digits: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """Compute convolutions and matrix products in bfloat16 where asked for."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked for, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def place(module: Module, device: torch.device) -> Module:
    """Move a convolutional model to its device in the channels-last layout, which its kernels prefer."""
    speed_up_group_norms(module)
    return module.to(device=device).to(memory_format=torch.channels_last)


def matrix_peak_flops_per_sec(device: torch.device, precision: Precision, *, side: int | None = None) -> float:
    """Measure the rate of a large matrix product: what a training step could reach at best."""
    side = side or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device).to(dtype)  # beforehand: autocast would convert them each time
    best_sec = float("inf")
    with torch.inference_mode():
        for _ in range(6):
            synchronize(device)
            began_sec = time.perf_counter()
            for _ in range(3):
                a @ b
            synchronize(device)
            best_sec = min(best_sec, (time.perf_counter() - began_sec) / 3)
    return 2 * side**3 / best_sec


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Count the operations of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()
