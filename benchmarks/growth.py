"""How the cost of each stage grows with images, pixels, steps and processes.

Each stage does its work at 1, 10 and 100 times a size, smallest models, after a run that warms up; its processor time
is kept, which other jobs on the machine hardly touch. The exponent is that of the last factor of 10 (1: linear, 2:
quadratic); where it lies far above the first one's, the cost bends. Fixed costs make the first exponent small.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import cpu_sec
from benchmarks.machine import describe_machine
from benchmarks.plain_training import random_cache
from benchmarks.precision_recall import draw_features, exact_precision_recall
from eqvae.artifacts.files import write_json
from eqvae.cli import run as eqvae
from eqvae.generators.recipes import PUBLISHED_LATENTS
from eqvae.images import open_images
from eqvae.latents.batches import training_batches

Do = Callable[[], object]

SHORT = "--device cpu --log-every 100000"
FINETUNE = (
    f"{SHORT} --num-workers 0 --perceptual none --adversarial-weight 0 --num-validation-images 4 "
    "--num-statistics-images 4"
)
TRAIN = f"{SHORT} --batch-size 4 --watch-steps 2 --num-watch-samples 1"


@dataclass(frozen=True)
class Stage:
    """A stage, and what grows."""

    name: str
    axis: str
    sizes: tuple[int, ...]
    prepare: Callable[[Path, int], Do]
    """Given a folder, makes what is not measured."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How the cost of each stage grows with images, pixels, steps and processes."""

    threads: int = 1
    """Threads of PyTorch."""

    device: str = "cpu"
    """Only `cpu`."""

    only: tuple[str, ...] = ()
    """Stages to measure, by name; none named: all."""

    times: int = 100
    """The largest size, in times the smallest: 1, 10 or 100."""

    json: Path | None = None
    """File to write the figures to."""


def command(words: str) -> Do:
    """Run a command here."""

    def do() -> None:
        if (code := eqvae(words.split())) != 0:
            raise SystemExit(f"'{words}' ended with {code}")

    return do


def pictures(folder: Path, count: int, side_px: int = 64) -> Path:
    """Write noise as PNG files, which all look alike to a disk."""
    data, random = folder / "data", np.random.default_rng(0)
    data.mkdir()
    for index in range(count):
        Image.fromarray(random.integers(256, size=(side_px, side_px, 3), dtype=np.uint8)).save(data / f"{index:06}.png")
    return data


def open_folder(folder: Path, count: int) -> Do:
    data = pictures(folder, count, 8)
    return lambda: len(open_images(str(data)))


def encode(folder: Path, count: int, side_px: int = 64) -> Do:
    data = pictures(folder, count, side_px)
    return command(f"encode untrained:tiny-kl --data {data} --image-size {side_px} --out {folder}/out --device cpu")


def finetune(folder: Path, steps: int, side_px: int = 64) -> Do:
    data = pictures(folder, 8, side_px)
    return command(
        f"finetune untrained:tiny-kl --data {data} --image-size {side_px} --batch-size 2 --max-steps {steps} "
        f"--out {folder}/out {FINETUNE}"
    )


def evaluate(folder: Path, count: int) -> Do:
    data = pictures(folder, count)
    return command(
        f"evaluate untrained:tiny-kl --data {data} --image-size 64 --out {folder}/out --device cpu --num-images {count}"
    )


def train(folder: Path, steps: int, num_cached: int = 64) -> Do:
    encode(folder, num_cached)()
    return command(f"train dit-ti-8 --latents {folder}/out --out {folder}/run --max-steps {steps} {TRAIN}")


def read(folder: Path, count: int) -> Do:
    latents = random_cache(folder / "latents", replace(PUBLISHED_LATENTS, num_classes=10), count)

    def do() -> None:
        for _ in training_batches(latents, batch_size=32, seed=0, num_steps=count // 32):
            pass

    return do


def score(folder: Path, count: int) -> Do:
    random = np.random.default_rng(0)
    for name in ("reference", "samples"):
        images = random.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", arr_0=images)
    return command(
        f"score {folder}/samples.npz --reference {folder}/reference.npz --features efficientnet-lite0 "
        f"--out {folder}/out --device cpu"
    )


def compare_features(folder: Path, count: int) -> Do:
    del folder
    real, fake = draw_features(count, of_samples=False), draw_features(count, of_samples=True)
    return lambda: exact_precision_recall(real, fake)


def processes(folder: Path, count: int) -> Do:
    """Fine-tune one batch of 8 with so many processes."""
    data = pictures(folder, 8)
    words = (
        f"-m torch.distributed.run --standalone --nproc-per-node {count} -m eqvae finetune untrained:tiny-kl "
        f"--data {data} --image-size 64 --batch-size 8 --max-steps 20 --out {folder}/out {FINETUNE}"
    )
    return lambda: subprocess.run([sys.executable, *words.split()], check=True, capture_output=True)


STAGES = (
    Stage("open a folder", "images", (100, 1000, 10_000), open_folder),
    Stage("encode", "images", (16, 160, 1600), encode),
    Stage("encode", "pixels", (32**2, 96**2, 320**2), lambda folder, px: encode(folder, 16, math.isqrt(px))),
    Stage("finetune", "steps", (4, 40, 400), finetune),
    Stage("finetune", "pixels", (32**2, 96**2, 320**2), lambda folder, px: finetune(folder, 10, math.isqrt(px))),
    Stage("finetune", "processes", (1, 2, 4), processes),
    Stage("evaluate", "images", (16, 160, 1600), evaluate),
    Stage("train", "steps", (10, 100, 1000), train),
    Stage("train 100 steps", "images in the cache", (64, 640, 6400), lambda folder, n: train(folder, 100, n)),
    Stage("read a cache once", "images", (320, 3200, 32_000), read),
    Stage("score", "images", (30, 300, 3000), score),
    Stage("precision and recall", "images", (100, 1000, 10_000), compare_features),
)


def measure(stage: Stage, times: int) -> dict[str, Any]:
    """Time a stage at each of its sizes."""
    rows = []
    for size in [stage.sizes[0], *stage.sizes]:  # the first one warms up
        if size > stage.sizes[0] * times:
            break
        with tempfile.TemporaryDirectory() as folder:
            do = stage.prepare(Path(folder), size)
            began_sec, began_cpu_sec = time.perf_counter(), cpu_sec()
            do()
            rows.append({"size": size, "sec": time.perf_counter() - began_sec, "cpu_sec": cpu_sec() - began_cpu_sec})
    rows = rows[1:]
    exponents = [
        math.log(large["cpu_sec"] / small["cpu_sec"]) / math.log(large["size"] / small["size"])
        for small, large in pairwise(rows)
    ]
    return {"stage": stage.name, "axis": stage.axis, "rows": rows, "exponents": exponents}


def run(name: str, options: Growth) -> None:
    """Measure all stages, print the table, and write the figures where asked."""
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(options.threads)
    figures = describe_machine(name, options) | {"stages": []}
    for stage in STAGES:
        if not options.only or stage.name in options.only:
            figures["stages"].append(measure(stage, options.times))
            print(row(figures["stages"][-1]), flush=True)
            if options.json is not None:
                write_json(options.json, figures)


def table(figures: dict[str, Any]) -> str:
    """Format the figures as a table in Markdown."""
    head = ["| stage | of | sizes | processor time, s | exponents |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(row, figures["stages"])])


def row(stage: dict[str, Any]) -> str:
    """Format a stage as a row."""
    sizes = ", ".join(f"{each['size']:,}" for each in stage["rows"])
    secs = ", ".join(f"{each['cpu_sec']:.2f}" for each in stage["rows"])
    exponents = ", ".join(f"{each:.2f}" for each in stage["exponents"])
    return f"| {stage['stage']} | {stage['axis']} | {sizes} | {secs} | {exponents} |"
