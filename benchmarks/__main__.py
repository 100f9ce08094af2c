"""`python -m benchmarks NAME [--against VARIANT] [--device DEVICE] [--json FILE]`; `tables` writes the page."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import (
    accelerator,
    encode,
    evaluate,
    finetune,
    generator,
    group_norm,
    growth,
    harness,
    long_run,
    maskgit,
    memory,
    nearest_code,
    padding,
    precision_recall,
    reader,
    sample,
    score,
    tables,
)

IN_TURNS: dict[str, type[harness.Work]] = {
    "finetune": finetune.FinetuneStep,
    "encode": encode.Encode,
    "reader": reader.Reader,
    "generator": generator.GeneratorStep,
    "maskgit": maskgit.MaskgitStep,
    "sample": sample.Sample,
    "evaluate": evaluate.Evaluate,
    "score": score.Score,
    "precision-recall": precision_recall.PrecisionRecall,
    "nearest-code": nearest_code.NearestCode,
    "group-norm": group_norm.GroupNorms,
}
"""Variants of one piece of work, ours among them."""

BENCHMARKS: dict[str, tuple[type[Any], Callable[[str, Any], None]]] = {
    **{name: (work, harness.run) for name, work in IN_TURNS.items()},
    "growth": (growth.Growth, growth.run),
    "long-run": (long_run.LongRun, long_run.run),
    "memory": (memory.Memory, memory.run),
    "padding": (padding.Padding, padding.run),
    "accelerator": (accelerator.Accelerator, accelerator.run),
}


def main() -> None:
    """Run one of them."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name == "tables":
        tables.write_tables()
    elif name in BENCHMARKS:
        options, measure = BENCHMARKS[name]
        measure(name, tyro.cli(options, args=flags, prog=f"python -m benchmarks {name}"))
    else:
        lines = (f"  {each:18}{(options.__doc__ or '').splitlines()[0]}" for each, (options, _) in BENCHMARKS.items())
        print(__doc__, "\n".join(lines), sep="\n\n")
        raise SystemExit(0 if name in ("--help", "-h") else 2)


if __name__ == "__main__":
    main()
