"""How EfficientNet-Lite0's distances grow with damage: CIFAR-10's training images against damaged test images.

    python docs/results/score/cifar10.py --data DIR [--num-images 5000] [--json docs/results/score/cifar10.json]

DIR holds `train.parquet` and `test.parquet`. Each kind of damage comes in three strengths, beside the untouched test
images; both distances must rise with the strength.
"""

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageFilter

from eqvae.artifacts.sample_sets import write_sample_set
from eqvae.images import open_images
from eqvae.images.image_sets import open_samples
from eqvae.metrics.statistics import FeatureStatistics, compute_statistics
from eqvae.networks.features import Measure, load_features, metric_key
from eqvae.runs.score import score_features
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.journal import device_name, installed_version
from eqvae.runtime.processes import join_processes

Damage = Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure distances between CIFAR-10's training images and damaged test images."""

    data: Path
    """Folder of `train.parquet` and `test.parquet`."""

    num_images: int = 5000
    """Of each set, at equal distances in its file."""

    kid_subsets: int = 20
    """Random subsets of 1,000 for the kernel distance."""

    features: str = "efficientnet-lite0"

    precision: Precision = "fp32"

    threads: int = 1

    device: str = "cpu"

    json: Path | None = None
    """Also write the figures here."""


def blurred(sigma: float) -> Damage:
    """Blur with a Gaussian of so many px."""
    return lambda image, index: image.filter(ImageFilter.GaussianBlur(sigma))


def noisy(sigma: float) -> Damage:
    """Add Gaussian noise of so many of 255 levels, the same for an image at every strength but for its scale."""

    def damage(image: Image.Image, index: int) -> Image.Image:
        noise = np.random.default_rng((0, index)).normal(scale=sigma, size=(image.height, image.width, 3))
        return Image.fromarray(np.clip(np.rint(np.asarray(image) + noise), 0, 255).astype(np.uint8))

    return damage


def compressed(quality: int) -> Damage:
    """Write as JPEG of a quality, and read again."""

    def damage(image: Image.Image, index: int) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return damage


LADDERS: dict[str, dict[str, Damage]] = {
    "blur": {f"blur, sigma {sigma:g} px": blurred(sigma) for sigma in (0.5, 1.0, 2.0)},
    "noise": {f"noise, sigma {sigma} of 255": noisy(sigma) for sigma in (5, 15, 40)},
    "jpeg": {f"JPEG, quality {quality}": compressed(quality) for quality in (75, 40, 10)},
}
"""Each from mild to strong."""

UNTOUCHED = "test, untouched"

FIGURES: dict[str, Measure] = {
    "fd": "fid",
    "kd": "kid",
    "kd_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}
"""What a row says, and what `metric_key` calls it."""


def measure(options: Options, path: Path, damage: Damage | None, folder: Path) -> FeatureStatistics:
    """Extract the features of a set's images, damaged or not."""
    source = open_images(str(path))
    indices = range(0, len(source), len(source) // options.num_images)[: options.num_images]
    images = [source.read(index) for index in indices]
    if damage is not None:
        images = [damage(image, index) for index, image in zip(indices, images, strict=True)]
    write_sample_set(folder / "set.npz", np.stack([np.asarray(image) for image in images]))
    device = choose_device(options.device)
    samples = open_samples(folder / "set.npz")
    return compute_statistics(
        place(load_features(options.features), device),
        samples,
        indices=range(len(samples)),
        device=device,
        processes=join_processes(device),
        precision=options.precision,
    )


def main(options: Options) -> None:
    """Measure every set, print the table, and say whether it is monotone."""
    torch.set_num_threads(options.threads)
    began_sec = time.perf_counter()
    rows: dict[str, dict[str, Any]] = {}
    damages = {UNTOUCHED: None} | {name: damage for ladder in LADDERS.values() for name, damage in ladder.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = measure(options, options.data / "train.parquet", None, folder)
        for name, damage in damages.items():
            samples = measure(options, options.data / "test.parquet", damage, folder)
            figures = score_features(samples=samples, reference=reference, kid_subsets=options.kid_subsets)
            rows[name] = {short: figures[metric_key(options.features, measure)] for short, measure in FIGURES.items()}
            rows[name]["fingerprint"] = figures["provenance"]["samples"]["fingerprint"]
            shown = " ".join(f"{rows[name][key]:10.5f}" for key in ("fd", "kd", "precision", "recall"))
            print(f"{name:24} {shown}", flush=True)  # noqa: T201
    ladders = {
        f"{figure}, {kind}": is_monotone([rows[name][figure] for name in ladder], rises=figure in ("fd", "kd"))
        for kind, ladder in LADDERS.items()
        for figure in ("fd", "kd", "precision", "recall")
    }
    print("\n".join(f"monotone: {name}: {'yes' if yes else 'NO'}" for name, yes in ladders.items()))  # noqa: T201
    if options.json is not None:
        content = {
            "machine": {"device": device_name(choose_device(options.device)), "num_threads": options.threads},
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "versions": {name: installed_version(name) for name in ("eqvae", "torch", "timm", "pillow")},
            "command": " ".join(["python", "docs/results/score/cifar10.py", *mask(sys.argv[1:], str(options.data))]),
            "minutes": round((time.perf_counter() - began_sec) / 60, 1),
            "reference": reference.provenance.fingerprint,
            "weights": reference.provenance.weights_fingerprint,
            "precision": options.precision,
            "rows": rows,
            "monotone": ladders,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def is_monotone(values: list[float], *, rises: bool) -> bool:
    """Tell whether values move one way as the damage grows."""
    signed = np.array(values) if rises else -np.array(values)
    return bool((np.diff(signed) > 0).all())


def commit() -> str:
    """Ask git about this checkout; empty where it doesn't answer."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def mask(arguments: list[str], data: str) -> list[str]:
    """Leave out where the data lie on this machine."""
    return ["DIR" if argument == data else argument for argument in arguments]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
