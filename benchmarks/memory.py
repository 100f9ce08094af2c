"""What `--dry-run` says of memory, against the most that the process had.

    python -m benchmarks memory --json docs/results/benchmarks/memory.json

Each command runs in a process of its own, two steps long; its peak is what the system saw of it (resident set), on a
processor with one thread.
"""

import importlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from eqvae.artifacts.files import write_json
from eqvae.cli import run as run_command

SHORT = "--max-steps 2 --device cpu --log-every 1"
FINETUNE = (
    f"{SHORT} --data photos --perceptual none --num-validation-images 4 --num-statistics-images 4 --num-workers 0"
)
TRAIN = f"{SHORT} --watch-steps 2 --num-watch-samples 8"
SAMPLE = "--num-steps 2 --device cpu"
ENCODE = "--data photos --num-workers 0 --device cpu"
TAESD = Path(__file__).resolve().parents[2] / "shared" / "models" / "taesd"
CACHES = {
    "latents": f"encode untrained:tiny-kl --image-size 256 {ENCODE}",
    "small": f"encode untrained:sd-vae --image-size 128 {ENCODE}",
}
CASES = {
    "finetune tiny-kl, 64 px, batch 4, bf16": "finetune untrained:tiny-kl --image-size 64 --batch-size 4 "
    f"--adversarial-weight 0 {FINETUNE}",
    "finetune tiny-kl, 256 px, batch 8, bf16": f"finetune untrained:tiny-kl --image-size 256 --batch-size 8 {FINETUNE}",
    "finetune tiny-kl, 256 px, batch 4, fp32": "finetune untrained:tiny-kl --image-size 256 --batch-size 4 "
    f"--precision fp32 {FINETUNE}",
    "finetune taesd, 128 px, batch 8, bf16": f"finetune {TAESD} --image-size 128 --batch-size 8 {FINETUNE}",
    "finetune sd-vae, 128 px, batch 2, bf16": f"finetune untrained:sd-vae --image-size 128 --batch-size 2 {FINETUNE}",
    "train dit-ti-2, batch 16, bf16": f"train dit-ti-2 --latents latents --batch-size 16 {TRAIN}",
    "train sit-s-2, batch 16, fp32, checkpointed": "train sit-s-2 --latents latents --batch-size 16 --precision fp32 "
    f"--gradient-checkpointing {TRAIN}",
    "train dit-b-2, batch 8, bf16": f"train dit-b-2 --latents latents --batch-size 8 {TRAIN}",
    "train sit-s-2, batch 32, bf16, latents of sd-vae": f"train sit-s-2 --latents small --batch-size 32 {TRAIN}",
    "sample dit-ti-2, batch 8": f"sample train-5 --num-samples 8 --batch-size 8 {SAMPLE}",
    "sample dit-b-2, batch 32": f"sample train-7 --num-samples 32 --batch-size 32 {SAMPLE}",
    "sample dit-b-2, batch 16, fp32": f"sample train-7 --num-samples 16 --batch-size 16 --precision fp32 {SAMPLE}",
    "sample sit-s-2, batch 8, decoded by sd-vae at 128 px": f"sample train-8 --num-samples 8 --batch-size 8 {SAMPLE}",
}
"""`train-5` is what the case with this number left."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What `--dry-run` says of memory, against the most that the process had."""

    json: Path | None = None
    """Where the figures go."""

    threads: int = 1


def eqvae(command: str, folder: str) -> tuple[str, float]:
    """Run a command in a child of this process, which has imported what all of them need.

    Args:
        command: Its words.
        folder: Where.

    Returns:
        What it printed, and the most memory that it had, in GiB.

    Raises:
        SystemExit: If it fails.
    """
    said = Path(folder, "said")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            code = run_command(command.split())
            sys.stdout.flush()
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise SystemExit(f"'{command}' failed")
    return said.read_text(), usage.ru_maxrss / 2**20


def run(benchmark: str, options: Memory) -> None:
    """Measure all cases, and write the figures where asked."""
    torch.set_num_threads(options.threads)
    for name in ("finetune_run", "encode_run", "train", "sample", "memory"):
        importlib.import_module(f"eqvae.runs.{name}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, command in CACHES.items():
            eqvae(f"{command} --out {name}", folder)
        for number, (name, command) in enumerate(CASES.items()):
            if str(TAESD) in command and not TAESD.exists():
                continue
            words = f"{command} --out {command.split()[0]}-{number}"
            said = json.loads(eqvae(f"{words} --dry-run", folder)[0])
            _, measured_gib = eqvae(words, folder)
            phases = {key: value for key, value in said.items() if key.startswith("memory_gib_")}
            rows.append({
                "case": name, "predicted_gib": said["memory_gib"], "measured_gib": measured_gib,
                "ratio": said["memory_gib"] / measured_gib, **phases,
            })  # fmt: skip
            print(f"{name:45} {said['memory_gib']:8.2f} {measured_gib:8.2f} {rows[-1]['ratio']:6.2f}", flush=True)
    if options.json is not None:
        write_json(options.json, describe_machine(benchmark, options) | {"rows": rows})
