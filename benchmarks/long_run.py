"""Whether a long run stays as fast and as small as it began: a tiny generator, step 10,000 against step 1,000.

    python -m benchmarks long-run --json docs/results/benchmarks/long_run.json

A step's time is the process's own processor time between two steps, all that a loop does included. Every 20 steps
another process does a fixed piece of work in between, by whose time that of steps is divided: what else the machine
does, and its clock, cancel out. Medians over 1,000 steps around each of the two, and the run with the median ratio.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.machine import describe_machine
from eqvae.artifacts.files import read_journal, write_json
from eqvae.cli import run as run_command
from eqvae.generators.recipes import SIZES
from eqvae.training.loop import Loop

EARLY, LATE, WINDOW = 1000, 10_000, 1000
YARDSTICK_EVERY = 20
LOG_EVERY, KEEP_EVERY, KEEP_LAST, WATCH_EVERY = 10, 250, 3, 2000
ENCODE = "encode untrained:tiny-kl-f2 --data images --image-size 16 --num-workers 0 --device cpu --out latents"
TRAIN = (
    f"train dit-ti-2 --latents latents --batch-size 2 --sample-every {WATCH_EVERY} --num-watch-samples 4 "
    f"--watch-steps 2 --max-steps {LATE + WINDOW // 2} --log-every {LOG_EVERY} --checkpoint-every {KEEP_EVERY} "
    f"--keep-every {KEEP_EVERY} --keep-last {KEEP_LAST} --precision fp32 --device cpu"
)
WIDTH, DEPTH = 48, 2
"""Of the generator, instead of dit-ti-2's 192 and 6."""

YARDSTICK = """
import sys, time
import numpy
matrix = numpy.full((96, 96), 1e-3, dtype=numpy.float32)
for line in sys.stdin:
    began = time.process_time()
    for _ in range(60):
        matrix @ matrix
        sum(range(500))
    print(time.process_time() - began, flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """How to measure."""

    json: Path | None = None
    """Where the figures go."""

    rounds: int = 3
    """Runs, of which the one with the median ratio counts."""

    threads: int = 1


@dataclass(kw_only=True)
class Watched:
    """What is seen of a run, step by step."""

    out: Path

    yardstick: Any
    """The process that does the fixed work."""

    step_sec: list[float] = field(default_factory=list)
    """Processor time."""

    clock_sec: list[float] = field(default_factory=list)

    yardstick_sec: dict[int, float] = field(default_factory=dict)
    """By step."""

    resident_mib: dict[int, float] = field(default_factory=dict)
    """By step."""

    weights_mib: dict[int, float] = field(default_factory=dict)
    """Of checkpoints and exported generators, by step."""

    _last: tuple[float, float] | None = None

    def end_step(self) -> None:
        """Write down what the step that ends has taken, and now and then compare."""
        now = (time.process_time(), time.perf_counter())
        if self._last is not None:
            self.step_sec.append(now[0] - self._last[0])
            self.clock_sec.append(now[1] - self._last[1])
        step = len(self.step_sec)
        if step % YARDSTICK_EVERY == 0:
            print(file=self.yardstick.stdin, flush=True)
            self.yardstick_sec[step] = float(self.yardstick.stdout.readline())
            self.resident_mib[step] = psutil.Process().memory_info().rss / 2**20
        if step in (EARLY, LATE):
            sizes = {path.stat().st_ino: path.stat().st_size for path in self.out.rglob("*.safetensors")}
            self.weights_mib[step] = sum(sizes.values()) / 2**20
        self._last = (time.process_time(), time.perf_counter())

    def around(self, step: int) -> dict[str, float]:
        """Take medians over the steps around one.

        Args:
            step: That one.

        Returns:
            Its figures.
        """
        window = slice(step - WINDOW // 2, step + WINDOW // 2)
        compared = [each for each in self.yardstick_sec if window.start <= each < window.stop]
        own, fixed = median(self.step_sec[window]), median(self.yardstick_sec[each] for each in compared)
        return {
            "processor_ms_per_step": 1e3 * own,
            "clock_ms_per_step": 1e3 * median(self.clock_sec[window]),
            "yardsticks_per_step": own / fixed,
            "resident_mib": median(self.resident_mib[each] for each in compared),
            "weights_mib": self.weights_mib[step],
        }


@contextlib.contextmanager
def watching(out: Path) -> Iterator[Watched]:
    """Look at each step that a loop takes meanwhile.

    Args:
        out: The run's folder.

    Yields:
        What is seen.
    """
    take_step = Loop._step
    with subprocess.Popen(
        [sys.executable, "-c", YARDSTICK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as yardstick:
        watched = Watched(out=out, yardstick=yardstick)

        def step(loop: Loop, batch: Any) -> Any:
            figures = take_step(loop, batch)
            watched.end_step()
            return figures

        with mock.patch.object(Loop, "_step", step):
            yield watched
        assert yardstick.stdin is not None
        yardstick.stdin.close()


def measure(out: Path) -> dict[str, Any]:
    """Train.

    Args:
        out: The run's folder.

    Returns:
        What was seen.

    Raises:
        SystemExit: If the command fails.
    """
    with watching(out) as watched:
        if run_command([*TRAIN.split(), "--out", str(out)]) != 0:
            raise SystemExit(f"'{TRAIN}' failed")
    early, late, records = watched.around(EARLY), watched.around(LATE), read_journal(out)
    return {
        "case": "train",
        "command": TRAIN,
        f"at_{EARLY}": early,
        f"at_{LATE}": late,
        "throughput_ratio": early["yardsticks_per_step"] / late["yardsticks_per_step"],
        "resident_ratio": late["resident_mib"] / early["resident_mib"],
        "num_steps_recorded": sum(record["kind"] == "train" for record in records),
        "num_other_records": sum(record["kind"] != "train" for record in records),
        "journal_bytes": (out / "journal.jsonl").stat().st_size,
        "num_checkpoints": len(list(out.glob("checkpoint*"))) + len(list(out.glob("milestones/*"))),
    }


def run(benchmark: str, options: LongRun) -> None:
    """Measure.

    Args:
        benchmark: Its name.
        options: How.

    Raises:
        SystemExit: If a command fails.
    """
    torch.set_num_threads(options.threads)
    narrow = replace(SIZES["ti"], hidden_size=WIDTH, depth=DEPTH)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), mock.patch.dict(SIZES, ti=narrow):
        Path("images").mkdir()
        noise = np.random.default_rng(0)
        for index in range(32):
            pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("images", f"{index}.png"))
        if run_command(ENCODE.split()) != 0:
            raise SystemExit(f"'{ENCODE}' failed")
        rows = [measure(Path(f"run-{number}")) for number in range(options.rounds)]
    rows.sort(key=lambda row: row["throughput_ratio"])
    row = rows[len(rows) // 2] | {"throughput_ratios": [each["throughput_ratio"] for each in rows]}
    print(row, flush=True)
    if options.json is not None:
        write_json(options.json, describe_machine(benchmark, options) | {"rows": [row]})
