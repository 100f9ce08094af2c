"""How fast the device could be: the rate of matrix products that it reaches, for "share of the peak"."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from eqvae.runtime.device import Precision, synchronize


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
