"""Time and memory of finding the nearest of 16384 codes of 256 numbers for 256 tokens of each of 64 images.

    python benchmarks/nearest_code.py [--num-images 64] [--reference-images 2] [--threads N] [--json FILE]

The reference is the plain broadcasted distance, `((z[:, None] - e) ** 2).sum(2).argmin(1)`. For all images at once it
would need 256 GiB twice, so it takes one image at a time: 4 GiB of differences and 4 GiB of their squares. Its time is
measured on a few images, which are alike, and compared per image. `cdist` is what diffusers' `VQModel` does, for all
images at once. Ours is `eqvae.autoencoders.quantization.nearest_codes`. Each runs in a process of its own, so that its
peak memory (VmHWM) is its own.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from eqvae.autoencoders.quantization import nearest_codes
from eqvae.runtime.device import choose_device, synchronize
from eqvae.runtime.seeds import generator_for
from machine import describe_machine, measure_apart, peak_mib

Variant = Literal["reference", "cdist", "ours"]
VARIANTS: tuple[Variant, ...] = ("reference", "cdist", "ours")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the search for the nearest code."""

    num_images: int = 64
    """Images of ours and of cdist."""

    reference_images: int = 2
    """The first of them, for the reference."""

    num_tokens: int = 256
    """Of an image."""

    num_codes: int = 16384

    width: int = 256
    """Numbers in a code."""

    num_repetitions: int = 3
    """The fastest counts; the reference runs once."""

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    device: str = "cpu"
    """`cpu`, `cuda`; memory is the process's on the first and PyTorch's own on the second."""

    json: Path | None = None
    """File to write the figures to."""

    measure: Variant | None = None
    """Measure this one here and print its figures; the command calls itself with it."""


PASSED_ON = (
    "num_images",
    "reference_images",
    "num_tokens",
    "num_codes",
    "width",
    "num_repetitions",
    "threads",
    "device",
)


def broadcasted(vectors: Tensor, codebook: Tensor, num_tokens: int) -> Tensor:
    """The reference, one image at a time."""
    parts = [((image[:, None] - codebook) ** 2).sum(2).argmin(1) for image in vectors.split(num_tokens)]
    return torch.cat(parts)


@torch.inference_mode()
def measure(variant: Variant, options: Options) -> dict[str, Any]:
    """Measure one variant in this process."""
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    num_images = options.reference_images if variant == "reference" else options.num_images
    codebook = torch.randn(options.num_codes, options.width, generator=generator_for(0)).to(device)
    vectors = torch.randn(num_images * options.num_tokens, options.width, generator=generator_for(1)).to(device)
    before_mib = peak_mib(device)
    times_sec = []
    for _ in range(1 if variant == "reference" else options.num_repetitions):
        synchronize(device)
        began_sec, began_cpu_sec = time.perf_counter(), time.process_time()
        if variant == "reference":
            tokens = broadcasted(vectors, codebook, options.num_tokens)
        elif variant == "cdist":
            tokens = torch.cdist(vectors, codebook).argmin(1)
        else:
            tokens = nearest_codes(vectors, codebook)
        synchronize(device)
        times_sec.append((time.perf_counter() - began_sec, time.process_time() - began_cpu_sec))
    sec, cpu_sec = (min(values) for values in zip(*times_sec, strict=True))
    return {
        "num_images": num_images,
        "ms_per_image": 1000 * sec / num_images,
        "cpu_ms_per_image": 1000 * cpu_sec / num_images,
        "peak_mib": peak_mib(device),
        "before_mib": before_mib,
        "first_tokens": tokens[: options.reference_images * options.num_tokens].tolist(),
    }


def main(options: Options) -> None:
    """Run the benchmark.

    Args:
        options: As given to the command.
    """
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options)))
        return
    description = describe_machine(
        __file__, options, device=choose_device(options.device), packages=(), leave_out=("json", "measure")
    )
    machine = description["machine"]
    print(
        f"{machine['cpu']}, {machine['num_threads']} threads, {machine['device']}, load {machine['load_average']:.1f}"
    )
    print(f"{options.num_codes} codes of {options.width} numbers, {options.num_tokens} tokens an image")
    print(f"{'':12}{'images':>8}{'ms/image':>10}{'ms of CPU':>11}{'peak MiB':>11}{'before':>9}")
    figures, tokens = {}, {}
    for name in VARIANTS:
        row = figures[name] = measure_apart(__file__, name, options, PASSED_ON)
        tokens[name] = row.pop("first_tokens")
        print(
            f"{name:12}{row['num_images']:8}{row['ms_per_image']:10.1f}{row['cpu_ms_per_image']:11.1f}"
            f"{row['peak_mib']:11.0f}{row['before_mib']:9.0f}",
            flush=True,
        )
    ours, summary = figures["ours"], {}
    for name in ("reference", "cdist"):
        other = figures[name]
        same = sum(a == b for a, b in zip(tokens[name], tokens["ours"], strict=True)) / len(tokens["ours"])
        # Other programs may take the cores from one variant more than from the other: the CPU's time leaves that out.
        summary[f"against_{name}"] = {
            "times_faster": other["ms_per_image"] / ours["ms_per_image"],
            "times_less_cpu_time": other["cpu_ms_per_image"] / ours["cpu_ms_per_image"],
            "times_peak_memory": ours["peak_mib"] / other["peak_mib"],
            "share_of_equal_tokens": same,
        }
        print(
            f"ours / {name}: {summary[f'against_{name}']['times_faster']:.1f} times faster, "
            f"{summary[f'against_{name}']['times_less_cpu_time']:.1f} times less CPU time, peak memory "
            f"{summary[f'against_{name}']['times_peak_memory']:.3f} times, {100 * same:.2f}% of the tokens equal"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(description | summary | {"variants": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
