"""Memory and time of precision and recall on two sets of n feature vectors of 2048 numbers.

    python benchmarks/precision_recall.py [--num-images 50000] [--threads N] [--device cpu] [--json FILE]

The reference is ADM's algorithm (openai/guided-diffusion, evaluations/evaluator.py) in float32, written out below: rows
of 10,000 distances to a whole set at a time, inside or outside as rounding has it. Ours is
`eqvae.metrics.neighbours`. Each runs in a process of its own, so that its peak memory (VmHWM) is its own.
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

from eqvae.metrics.neighbours import BLOCK_SIZE, precision_recall
from eqvae.runtime.device import choose_device, synchronize
from eqvae.runtime.seeds import generator_for
from machine import describe_machine, measure_apart, peak_mib

NUM_FEATURES = 2048
ADM_BATCH_SIZE = 10_000
NUM_NEIGHBOURS = 3
VARIANTS = ("reference", "ours")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure precision and recall at the size of ADM's protocol."""

    num_images: int = 50_000
    """Feature vectors in each of the two sets."""

    block_size: int = BLOCK_SIZE
    """Of ours."""

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    device: str = "cpu"
    """`cpu`, `cuda`; memory is the process's on the first and PyTorch's own on the second."""

    reference: bool = True
    """Run the reference too."""

    json: Path | None = None
    """File to write the figures to."""

    measure: Literal["reference", "ours"] | None = None
    """Measure this one here and print its figures; the command calls itself with it."""


PASSED_ON = ("num_images", "block_size", "threads", "device")


def draw_features(num_images: int, of_samples: bool) -> Tensor:
    """Draw vectors like Inception's: not negative, of some 60 directions and noise; samples vary less."""
    directions = torch.randn(60, NUM_FEATURES, generator=generator_for(0)) / 8.0
    features = torch.empty(num_images, NUM_FEATURES)
    for start in range(0, num_images, 1000):
        rows = features[start : start + 1000]
        generator = generator_for(1 + of_samples, start)
        factors = (0.9 if of_samples else 1.0) * torch.randn(len(rows), len(directions), generator=generator)
        noise = 0.1 * torch.randn(rows.shape, generator=generator)
        rows.copy_((0.4 + factors @ directions + noise).relu_())
    return features


# The reference ------------------------------------------------------------------------------------------------------


def adm_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances by one product, which may come out below zero."""
    return (a.square().sum(1)[:, None] - 2.0 * a @ b.T + b.square().sum(1)).clamp_(min=0.0)


def adm_precision_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """ADM's precision and recall."""
    radii = []
    for features in (reference, samples):
        parts = []
        for rows in features.split(ADM_BATCH_SIZE):
            distances = rows.new_empty((len(rows), len(features)))
            for start in range(0, len(features), ADM_BATCH_SIZE):
                columns = slice(start, start + ADM_BATCH_SIZE)
                distances[:, columns] = adm_distances(rows, features[columns])
            parts.append(distances.topk(NUM_NEIGHBOURS + 1, dim=1, largest=False).values[:, -1])
        radii.append(torch.cat(parts))
    inside = [torch.zeros(len(each), dtype=torch.bool, device=each.device) for each in (samples, reference)]
    for row in range(0, len(reference), ADM_BATCH_SIZE):
        rows = slice(row, row + ADM_BATCH_SIZE)
        for column in range(0, len(samples), ADM_BATCH_SIZE):
            columns = slice(column, column + ADM_BATCH_SIZE)
            distances = adm_distances(reference[rows], samples[columns])
            inside[0][columns] |= (distances <= radii[0][rows, None]).any(0)
            inside[1][rows] |= (distances <= radii[1][columns]).any(1)
    return float(inside[0].double().mean()), float(inside[1].double().mean())


# Measuring ----------------------------------------------------------------------------------------------------------


def measure(variant: str, options: Options) -> dict[str, Any]:
    """Measure one variant in this process."""
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    reference, samples = (draw_features(options.num_images, of_samples).to(device) for of_samples in (False, True))
    synchronize(device)
    before_mib, began_sec, began_cpu_sec = peak_mib(device), time.perf_counter(), time.process_time()
    if variant == "ours":
        found = precision_recall(
            reference=reference, samples=samples, num_neighbours=NUM_NEIGHBOURS, block_size=options.block_size
        )
        precision, recall = found.precision, found.recall
    else:
        precision, recall = adm_precision_recall(reference, samples)
    synchronize(device)
    return {
        "sec": time.perf_counter() - began_sec,
        "cpu_sec": time.process_time() - began_cpu_sec,
        "peak_mib": peak_mib(device),
        "before_mib": before_mib,
        "precision": precision,
        "recall": recall,
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
    print(f"{options.num_images} x {options.num_images} pairs of {NUM_FEATURES} numbers")
    print(f"{'':12}{'s':>9}{'s of CPU':>10}{'peak MiB':>11}{'before':>9}{'precision':>12}{'recall':>10}")
    figures = {}
    for name in VARIANTS if options.reference else ("ours",):
        row = figures[name] = measure_apart(__file__, name, options, PASSED_ON)
        print(
            f"{name:12}{row['sec']:9.1f}{row['cpu_sec']:10.1f}{row['peak_mib']:11.0f}{row['before_mib']:9.0f}"
            f"{row['precision']:12.6f}{row['recall']:10.6f}",
            flush=True,
        )
    summary = {}
    if options.reference:
        ours, reference = figures["ours"], figures["reference"]
        # Other programs may take the cores from one variant more than from the other: the CPU's time leaves that out.
        summary["times_less_cpu_time"] = reference["cpu_sec"] / ours["cpu_sec"]
        summary["times_faster"] = reference["sec"] / ours["sec"]
        summary["times_peak_memory"] = ours["peak_mib"] / reference["peak_mib"]
        print(
            f"\nours / reference: {summary['times_faster']:.2f} times faster by the clock, "
            f"{summary['times_less_cpu_time']:.2f} times less CPU time, "
            f"peak memory {summary['times_peak_memory']:.2f} times"
        )
    if options.json is not None:
        text = json.dumps(description | summary | {"num_images": options.num_images, "variants": figures}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
