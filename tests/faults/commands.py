"""The commands that are broken off, at a scale at which each takes a second, and what must be equal in the end."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from eqvae.artifacts.files import read_journal
from eqvae.artifacts.names import CHECKPOINT_BEFORE, ENVIRONMENT, JOURNAL

FINETUNE = (
    "--max-steps", "6", "--checkpoint-every", "2", "--keep-every", "4", "--validate-every", "3", "--log-every", "1",
    "--batch-size", "2", "--image-size", "32", "--num-validation-images", "2", "--num-statistics-images", "2",
    "--adversarial-weight", "0", "--perceptual", "none", "--precision", "fp32", "--num-workers", "0",
)  # fmt: skip
ENCODE = ("--image-size", "32", "--batch-size", "2", "--shard-size", "3", "--precision", "fp32", "--num-workers", "0")
TRAIN = (
    "--max-steps", "6", "--batch-size", "2", "--checkpoint-every", "2", "--keep-every", "4", "--sample-every", "3",
    "--num-watch-samples", "4", "--watch-steps", "2", "--log-every", "1", "--posthoc-ema", "--precision", "fp32",
)  # fmt: skip
SAMPLE = ("--num-samples", "10", "--num-steps", "2", "--batch-size", "2", "--precision", "fp32")

COMMANDS = ("finetune", "encode", "train", "sample", "reproduce")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the inputs of the commands lie."""

    images: Path

    latents: Path

    run: Path

    def arguments(self, command: str, out: Path) -> tuple[str, ...]:
        """The command line that writes into a folder."""
        autoencoder, data = "untrained:tiny-kl-f2", ("--data", str(self.images))
        given = {
            "finetune": (autoencoder, *data, "--validation-data", str(self.images), *FINETUNE),
            "encode": (autoencoder, *data, *ENCODE),
            "train": ("dit-ti-2", "--latents", str(self.latents), "--reference", str(self.images), *TRAIN),
            "sample": (str(self.run), *SAMPLE),
            "reproduce": ("table8", "--scale", "tiny"),
        }
        return (command, *given[command], "--out", str(out), "--device", "cpu")


@dataclass(kw_only=True)
class Straight:
    """A run that nothing disturbed."""

    files: dict[str, Any]

    sec: float

    num_operations: int

    arguments: tuple[str, ...]

    losses: list[str] = field(default_factory=list)


def contents(out: Path) -> dict[str, Any]:
    """Digest all files of a folder, without what clocks and paths say."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or ".locks" in name:
            continue
        if path.name in (ENVIRONMENT, CHECKPOINT_BEFORE):
            found[name] = None
        elif path.name == JOURNAL:
            records = [record for record in read_journal(path.parent) if record["kind"] in ("train", "validation")]
            if records:  # others speak of the faults
                found[name] = [_timeless(record) for record in records]
        elif (path.suffix == ".json" and path.parent != out) or path.name in ("config.json", "metrics.json"):
            found[name] = _timeless(json.loads(path.read_text().replace(str(out), "OUT")))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np" if "shard" in path.name else "pt") as file:
                found[name] = {key: _digest(file.get_tensor(key)) for key in sorted(file.keys())}
        elif path.suffix in (".md", ".json", ".svg"):
            found[name] = None  # a page carries its date
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    # A finished run's checkpoint before the last one is of the step at which it was broken off.
    return {name: value for name, value in found.items() if not name.endswith(CHECKPOINT_BEFORE)}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        clocks = ("_sec", "out", "share_of_peak", "date")
        return {key: _timeless(each) for key, each in value.items() if not key.endswith(clocks)}
    return value


def _digest(tensor: Any) -> str:
    content = tensor.tobytes() if hasattr(tensor, "tobytes") else tensor.contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def differences(out: Path, straight: Straight) -> list[str]:
    """Name the files that are not those of the undisturbed run."""
    files = contents(out)
    strange = [f"{name} is stray" for name in files.keys() - straight.files.keys()]
    missing = [f"{name} is missing" for name in straight.files.keys() - files.keys()]
    changed = [
        f"{name} differs" for name in files.keys() & straight.files.keys() if files[name] != straight.files[name]
    ]
    return sorted(strange + missing + changed)
