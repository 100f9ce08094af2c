"""What a GPU makes of it, within a budget of seconds: the most valuable first; run again, it goes on.

Each case is one of the other benchmarks at a GPU's size. `--rehearse` takes their smallest sizes, on a CPU too.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.encode import Encode
from benchmarks.finetune import FinetuneStep
from benchmarks.generator import GeneratorStep
from benchmarks.harness import Work
from benchmarks.harness import run as measure_and_write
from benchmarks.maskgit import MaskgitStep
from benchmarks.sample import Sample
from benchmarks.score import Score

OURS = {"variants": ("ours",)}

CASES: dict[str, Work] = {
    "dit-xl-2": GeneratorStep(recipe="dit-xl-2", batch_size=64, compile=True, **OURS),
    "finetune": FinetuneStep(batch_size=8, **OURS),
    "sit-xl-2": GeneratorStep(recipe="sit-xl-2", batch_size=64, compile=True, **OURS),
    "encode": Encode(num_images=128, batch_size=32, **OURS),
    "sample": Sample(recipe="sit-xl-2", batch_size=32, **OURS),
    "score": Score(num_images=2000, batch_size=128),
    "maskgit": MaskgitStep(recipe="maskgit-b", batch_size=128, **OURS),
    "dit-xl-2, checkpointed": GeneratorStep(
        recipe="dit-xl-2", batch_size=128, compile=True, gradient_checkpointing=True, **OURS
    ),
}
"""In order of value."""

SMALLEST: dict[str, Work] = {
    "dit-xl-2": GeneratorStep(recipe="dit-ti-8", batch_size=1, **OURS),
    "finetune": FinetuneStep(autoencoder="tiny-kl", image_size=128, batch_size=1, **OURS),
    "encode": Encode(autoencoder="tiny-kl", image_size=64, num_images=2, **OURS),
    "sample": Sample(recipe="sit-ti-8", batch_size=1, **OURS),
}


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """What a GPU makes of it, within a budget of seconds."""

    out: Path
    """Folder of one JSON for each case; those that are there are not measured again."""

    budget_sec: int = 480
    """No case is begun after it."""

    device: str = "auto"

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    rehearse: bool = False
    """The smallest sizes."""


def run(name: str, options: Accelerator) -> None:
    """Measure one case after the other.

    Args:
        name: Of the benchmark.
        options: As given.
    """
    del name
    from benchmarks.__main__ import IN_TURNS  # which lists this one too

    names = {kind: each for each, kind in IN_TURNS.items()}
    began_sec = time.monotonic()
    for case, work in (SMALLEST if options.rehearse else CASES).items():
        path = options.out / f"{case.replace(', ', '-')}.json"
        if path.exists():
            continue
        spent_sec = time.monotonic() - began_sec
        if spent_sec > options.budget_sec:
            print(f"{spent_sec:.0f} s are spent: '{case}' and what follows are left for the next call")
            return
        try:
            work = replace(work, device=options.device, threads=options.threads, json=path)
            measure_and_write(names[type(work)], work, case=case)
        except SystemExit as error:  # the next case may do
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{path.stem}.failed.json").write_text(json.dumps({"case": case, "error": str(error)}))
            print(f"'{case}': {error}", flush=True)
