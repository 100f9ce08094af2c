"""`eqvae evaluate --all`, against the same command of an earlier commit.

Each turn is a whole command in a process of its own, start included.
"""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.encode import write_photographs
from benchmarks.harness import Turn, Variant, Work
from benchmarks.machine import ROOT, git
from eqvae.runtime.device import Precision


@dataclass(frozen=True, kw_only=True)
class Evaluate(Work):
    """`eqvae evaluate --all`, against the same command of an earlier commit."""

    unit = "image"

    commit: str = "a1833bd"
    """What ours is held against."""

    autoencoder: str = "tiny-kl"
    """What is evaluated."""

    data: str | None = None
    """On what; None: squares out of the built-in photographs."""

    image_size: int = 128
    """Side of the images, in px."""

    num_images: int = 200
    """Of a turn."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            self.commit: Variant(self.earlier, memory=False),
            "ours": Variant(lambda folder: self.prepare(ROOT / "src", folder), memory=False),
            "ours, bf16": Variant(lambda folder: self.prepare(ROOT / "src", folder, "bf16"), "bf16", memory=False),
        }

    def earlier(self, folder: Path) -> Turn:
        """Unpack the earlier commit's sources."""
        archive = folder / "src.tar"
        git("archive", "--output", str(archive), self.commit, "src")
        shutil.unpack_archive(archive, folder, filter="data")
        return self.prepare(folder / "src", folder)

    def prepare(self, sources: Path, folder: Path, precision: Precision = "fp32") -> Turn:
        """Run the command from these sources."""
        numbers = itertools.count()
        data = self.data or str(write_photographs(folder / "photographs", self.num_images))
        flags = {
            "data": data, "image-size": self.image_size, "num-images": self.num_images, "device": self.device,
            "features": "efficientnet-lite0", "precision": precision,
        }  # fmt: skip
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]

        def take_turn() -> dict[str, Any]:
            out = folder / f"evaluation-{next(numbers)}"
            command = [sys.executable, "-m", "eqvae", "evaluate", self.autoencoder, "--all", "--out", str(out), *words]
            environment = os.environ | {"PYTHONPATH": str(sources)}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            return {"units": self.num_images}

        return take_turn
