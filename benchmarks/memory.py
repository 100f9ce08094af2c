"""What `--dry-run` says of memory, against the most that the process had.

    python benchmarks/memory.py --json docs/results/benchmarks/memory.json

Each command runs in a process of its own, two steps long; its peak is what the system saw of it (resident set).
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from eqvae.artifacts.files import write_json
from machine import describe_machine

SHORT = "--max-steps 2 --device cpu --log-every 1"
FINETUNE = (
    f"{SHORT} --data photos --perceptual none --num-validation-images 4 --num-statistics-images 4 --num-workers 0"
)
TRAIN = f"{SHORT} --latents latents --watch-steps 2 --num-watch-samples 4"
ENCODE = "encode untrained:tiny-kl --data photos --image-size 256 --out latents --num-workers 0 --device cpu"
CASES = {
    "finetune tiny-kl, 256 px, batch 8, bf16": f"finetune untrained:tiny-kl --image-size 256 --batch-size 8 {FINETUNE}",
    "finetune tiny-kl, 256 px, batch 8, fp32": "finetune untrained:tiny-kl --image-size 256 --batch-size 8 "
    f"--precision fp32 {FINETUNE}",
    "finetune sd-vae, 128 px, batch 2, bf16": f"finetune untrained:sd-vae --image-size 128 --batch-size 2 {FINETUNE}",
    "train dit-s-2, batch 32, bf16": f"train dit-s-2 --batch-size 32 {TRAIN}",
    "train dit-s-2, batch 32, fp32, checkpointed": "train dit-s-2 --batch-size 32 --precision fp32 "
    f"--gradient-checkpointing {TRAIN}",
    "train dit-b-2, batch 8, bf16": f"train dit-b-2 --batch-size 8 {TRAIN}",
    "sample dit-b-2, batch 32": "sample train-5 --num-samples 32 --batch-size 32 --num-steps 2 --device cpu",
}
"""`train-5` is the run of the case before."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure."""

    json: Path | None = None
    """Where the figures go."""

    threads: int = 1


def eqvae(command: str, folder: str, threads: int) -> tuple[str, float]:
    """Run a command.

    Args:
        command: Its words.
        folder: Where.
        threads: How many it may have.

    Returns:
        What it printed, and the most memory that it had, in GiB.

    Raises:
        SystemExit: If it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "eqvae", *command.split()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"'{command}' failed")
    return printed, usage.ru_maxrss / 2**20


def main(options: Options) -> None:
    """Measure all cases.

    Args:
        options: How.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        eqvae(ENCODE, folder, options.threads)
        for number, (name, command) in enumerate(CASES.items()):
            words = f"{command} --out {command.split()[0]}-{number}"
            said = json.loads(eqvae(f"{words} --dry-run", folder, options.threads)[0])
            _, measured_gib = eqvae(words, folder, options.threads)
            phases = {key: value for key, value in said.items() if key.startswith("memory_gib_")}
            rows.append({
                "case": name, "predicted_gib": said["memory_gib"], "measured_gib": measured_gib,
                "ratio": said["memory_gib"] / measured_gib, **phases,
            })  # fmt: skip
            print(f"{name:45} {said['memory_gib']:8.2f} {measured_gib:8.2f} {rows[-1]['ratio']:6.2f}", flush=True)
    if options.json is not None:
        machine = describe_machine(__file__, options, device=torch.device("cpu"), packages=("diffusers",))
        write_json(options.json, {**machine, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Options))
