"""Variants of one piece of work in turns, each in a process of its own: ratios with spread, shares of the peak."""

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.machine import Peaks, describe_machine, measure_peaks, peak_mib
from eqvae.artifacts.files import write_json
from eqvae.runtime.device import Precision, choose_device, synchronize

Turn = Callable[[], dict[str, Any]]
"""Does the work once; says how many `units` it did, and what it found."""


@dataclass(frozen=True)
class Variant:
    """One way to do the work."""

    prepare: Callable[[Path], Turn]
    """Given an empty folder, builds what is done once."""

    precision: Precision = "fp32"
    """Whose peak it is held against."""

    memory: bool = True
    """Whether its process does the work itself, so that its memory and its operations are the work's."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured, and how; each benchmark adds its sizes."""

    unit: ClassVar[str] = "step"

    rounds: int = 3
    """Turns of each variant, after one that warms up."""

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `mps`."""

    against: str | None = None
    """The variant that ratios refer to; None: the first."""

    variants: tuple[str, ...] = ()
    """Which others are measured; none named: all."""

    json: Path | None = None
    """File to write the figures to."""

    def ways(self) -> dict[str, Variant]:
        """List the variants by name, the peer's way first."""
        raise NotImplementedError

    def check(self) -> None:
        """Hold the variants' results against one another before anything is timed."""

    @property
    def bytes_per_unit(self) -> float | None:
        """The least that a unit has to move through memory, where that is what limits it."""
        return None


@dataclass
class Worker:
    """The process of one variant."""

    work: Work
    name: str
    turns: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start it, and wait until it has warmed up."""
        os.environ["OMP_NUM_THREADS"] = str(self.work.threads)
        spawning = multiprocessing.get_context("spawn")
        self.connection, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(self.work, self.name, theirs), daemon=False)
        self.process.start()
        theirs.close()
        self.start = self.receive()

    def receive(self) -> dict[str, Any]:
        """Read what it says next."""
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit(f"'{self.name}' failed; see above") from None

    def take_turn(self) -> float:
        """Let it do the work once; return the seconds of a unit."""
        self.connection.send(True)
        self.turns.append(self.receive())
        return self.turns[-1]["sec"] / self.turns[-1]["units"]

    def end(self) -> None:
        """Let it go."""
        self.connection.close()
        self.process.join()


def serve(work: Work, name: str, connection: Connection) -> None:
    """Prepare a variant, warm it up, and do the work as often as asked."""
    torch.set_num_threads(work.threads)
    device, variant = choose_device(work.device), work.ways()[name]
    before_mib = peak_mib(device)
    with tempfile.TemporaryDirectory() as folder:
        turn = variant.prepare(Path(folder))
        with Operations() as operations:
            found = turn()
        turn()
        connection.send({"before_mib": before_mib, "flops_per_unit": operations.count / found["units"]})
        while asked(connection):
            synchronize(device)
            began_sec, began_cpu_sec = time.perf_counter(), cpu_sec()
            said = turn()
            synchronize(device)
            sec, busy_sec = time.perf_counter() - began_sec, cpu_sec() - began_cpu_sec
            connection.send({"sec": sec, "cpu_sec": busy_sec, "peak_mib": peak_mib(device), **said})


_ATEN = torch.ops.aten
_FORMULAS = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""PyTorch's, and what it has no formula for."""


class Operations(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention by PyTorch's formulas.

    PyTorch's own `FlopCounterMode` hooks into the backward pass, which the adaptive weight's gradients don't bear.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None:  # in inference mode, composite ones come whole
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


def asked(connection: Connection) -> bool:
    """Wait for the next turn, or for the end."""
    try:
        return connection.recv()
    except EOFError:  # another variant failed
        return False


def cpu_sec() -> float:
    """Read this process's processor time, and that of its children which ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(work: Work) -> dict[str, Any]:
    """Let all variants take turns.

    Args:
        work: What is measured.

    Returns:
        Medians and all turns by variant, ratios to the peer with their spread, and the machine's peaks.

    Raises:
        SystemExit: If a variant is unknown or fails.
    """
    ways = work.ways()
    peer = work.against or next(iter(ways))
    names = [peer, *(name for name in work.variants or ways if name != peer)]
    if unknown := [name for name in names if name not in ways]:
        raise SystemExit(f"no variant {unknown[0]!r}; there are {', '.join(map(repr, ways))}")
    work.check()
    peaks = [measure_peaks(work.device, work.threads)]
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(work, name))
        for number in range(work.rounds):
            for worker in workers:
                print(f"{number + 1}/{work.rounds} {worker.name}: {worker.take_turn():.4g} s a {work.unit}", flush=True)
    finally:
        for worker in workers:
            worker.end()
    peaks.append(measure_peaks(work.device, work.threads))
    peak = Peaks.largest(peaks)
    rows = {worker.name: summarize(worker, ways[worker.name], peak, work) for worker in workers}
    return {
        "unit": work.unit,
        "peer": peer,
        "peaks": vars(peak),
        "variants": rows,
        "ratios": {worker.name: compare(workers[0], worker) for worker in workers[1:]},
    }


def summarize(worker: Worker, variant: Variant, peak: Peaks, work: Work) -> dict[str, Any]:
    """Bring the turns of one variant together."""
    secs = [turn["sec"] / turn["units"] for turn in worker.turns]
    row: dict[str, Any] = {
        "sec": statistics.median(secs),
        "cpu_sec": statistics.median(turn["cpu_sec"] / turn["units"] for turn in worker.turns),
        "per_sec": 1 / statistics.median(secs),
        "precision": variant.precision,
        "turns": worker.turns,
    }
    if variant.memory:
        flops = worker.start["flops_per_unit"]
        row |= {"peak_mib": max(turn["peak_mib"] for turn in worker.turns), "before_mib": worker.start["before_mib"]}
        row |= {"flops": flops, "share_of_peak": flops / row["sec"] / peak.flops_per_sec(variant.precision)}
    if work.bytes_per_unit is not None:
        row["share_of_bandwidth"] = work.bytes_per_unit / row["sec"] / peak.bytes_per_sec
    return row


def compare(peer: Worker, other: Worker) -> dict[str, Any]:
    """Divide turn by turn, so that what else the machine did meets both."""
    ratios: dict[str, Any] = {}
    for key, name in (("sec", "times_faster"), ("cpu_sec", "times_less_cpu")):
        each = sorted(
            (theirs[key] / theirs["units"]) / (ours[key] / ours["units"])
            for theirs, ours in zip(peer.turns, other.turns, strict=True)
        )
        ratios[name] = {"median": statistics.median(each), "low": each[0], "high": each[-1]}
    ratios["times_memory"] = other.turns[-1]["peak_mib"] / peer.turns[-1]["peak_mib"]
    return ratios


def run(name: str, work: Work, **more: str) -> None:
    """Measure, print the table, and write the figures where asked, with what more is known of them."""
    description = describe_machine(name, work)
    print(
        f"{description['machine']['device']}, {work.threads} threads, load {description['machine']['load_average']:.1f}"
    )
    figures = description | more | measure(work)
    print("\n" + table(figures))
    if work.json is not None:
        write_json(work.json, figures)


def table(figures: dict[str, Any]) -> str:
    """Format the figures of one benchmark as a table in Markdown."""
    unit = figures["unit"]
    lines = [
        f"| variant | ms / {unit} | ms of processors | times faster | by processor time | peak MiB | share of peak |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in figures["variants"].items():
        ratio = figures["ratios"].get(name)
        times = [spread(ratio[key]) if ratio else "1" for key in ("times_faster", "times_less_cpu")]
        peak = f"{row['peak_mib']:,.0f}" if "peak_mib" in row else ""
        share = f"{row['share_of_peak']:.0%} of {row['precision']}" if row.get("flops") else ""
        if "share_of_bandwidth" in row:
            share = f"{row['share_of_bandwidth']:.0%} of bandwidth"
        cells = [name, f"{1e3 * row['sec']:,.4g}", f"{1e3 * row['cpu_sec']:,.4g}", *times, peak, share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(ratio: dict[str, float]) -> str:
    """Format a ratio with the range of its turns."""
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})"
