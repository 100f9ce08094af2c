"""How much faster 5,000 images are scored than one at a time through PNG files.

    python benchmarks/score.py [--num-images 5000] [--image-size 256] [--rounds 5] [--threads 1] [--json FILE]

The plain way is written out below: each sample becomes a PNG file, is read back, resized and run through
EfficientNet-Lite0 by itself in fp32, and the features are compared with NumPy. Ours writes one `.npz` and scores it
with `eqvae.metrics`, in fp32 and in bf16. All see the same crops of the built-in photographs, half of them blurred: the
blurred ones are scored against the others (Frechet distance, precision, recall). Rounds alternate between the ways, so
that what else runs on the machine meets all alike; the plain way takes a share of the images, and its time is scaled by
their number. Times are this process's own processor time, wall time beside it.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageFilter

from eqvae.artifacts.sample_sets import write_sample_set
from eqvae.images import open_images
from eqvae.images.image_sets import open_samples
from eqvae.metrics.frechet import frechet_distance
from eqvae.metrics.neighbours import precision_recall
from eqvae.metrics.statistics import compute_statistics
from eqvae.networks.features import FeatureExtractor, load_features
from eqvae.networks.pretrained import efficientnet_lite0_weights
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.processes import join_processes
from machine import describe_machine

CPU = torch.device("cpu")
NUM_NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare scoring with the plain way of it."""

    num_images: int = 5000
    """Extracted in all, half of them samples and half of them reference."""

    num_plain: int = 250
    """Of these, what the plain way takes; its time is scaled up."""

    image_size: int = 256
    """Side of the images, in px."""

    rounds: int = 5
    """Times that each way has its turn, with an equal share of its images."""

    batch_size: int = 64
    """Of ours."""

    threads: int = 1

    json: Path | None = None
    """Also write the figures here."""


@dataclass(kw_only=True)
class Way:
    """One row of the table."""

    num_images: int = 0
    processor_sec: float = 0.0
    wall_sec: float = 0.0
    scoring_sec: float = 0.0
    """Processor time of the comparison of all features."""

    features: list[np.ndarray] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def extract(self, run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> None:
        """Run a way on a share of the images and take the time."""
        began, began_wall = time.process_time(), time.perf_counter()
        self.features.append(run(images))
        self.processor_sec += time.process_time() - began
        self.wall_sec += time.perf_counter() - began_wall
        self.num_images += len(images)


def photographs(num_images: int, size_px: int) -> np.ndarray:
    """Cut random squares out of the built-in photographs; every second one is blurred."""
    source = open_images("photos")
    whole = [source.read(index) for index in range(len(source))]
    random = np.random.default_rng(0)
    images = np.empty((num_images, size_px, size_px, 3), dtype=np.uint8)
    for index in range(num_images):
        image = whole[random.integers(len(whole))]
        left, top = (int(random.integers(side - size_px + 1)) for side in image.size)
        crop = image.crop((left, top, left + size_px, top + size_px))
        images[index] = np.asarray(crop.filter(ImageFilter.GaussianBlur(1.0)) if index % 2 else crop)
    return images


# The plain way ------------------------------------------------------------------------------------------------------


def plain_network() -> torch.nn.Module:
    """Build timm's network as it comes."""
    network = timm.create_model("efficientnet_lite0").eval()
    network.load_state_dict(efficientnet_lite0_weights())
    network.reset_classifier(0)
    return network


@torch.no_grad()
def extract_plainly(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Write each image as PNG, then read, resize and run one at a time."""
    with tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(images):
            Image.fromarray(image).save(Path(folder) / f"{index:06}.png")
        rows = []
        for path in sorted(Path(folder).iterdir()):
            x = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float()
            x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True)
            rows.append(network((x - 127) / 128).numpy())
    return np.concatenate(rows)


def score_plainly(reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Compare features with NumPy alone."""
    root_of = np.cov(reference, rowvar=False)
    values, vectors = np.linalg.eigh(root_of)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    other = np.cov(samples, rowvar=False)
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other @ root), 0, None)).sum()
    offset = reference.mean(0) - samples.mean(0)
    squares = {name: (each.astype(np.float64) ** 2).sum(1) for name, each in (("r", reference), ("s", samples))}

    def distances(a: str, b: str) -> np.ndarray:
        x, y = ((reference if each == "r" else samples).astype(np.float64) for each in (a, b))
        return np.maximum(squares[a][:, None] - 2 * x @ y.T + squares[b][None], 0)

    radius = {each: np.partition(distances(each, each), NUM_NEIGHBOURS, axis=1)[:, NUM_NEIGHBOURS] for each in "rs"}
    between = distances("r", "s")
    return {
        "fd": float(offset @ offset + np.trace(root_of) + np.trace(other) - 2 * overlap),
        "precision": float((between <= radius["r"][:, None]).any(0).mean()),
        "recall": float((between <= radius["s"][None]).any(1).mean()),
    }


# Ours ---------------------------------------------------------------------------------------------------------------


def extract_ours(extractor: FeatureExtractor, precision: Precision, options: Options, images: np.ndarray) -> np.ndarray:
    """Write one archive and extract from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.npz"
        write_sample_set(path, images)
        samples = open_samples(path)
        statistics = compute_statistics(
            extractor, samples, indices=range(len(samples)), device=CPU, processes=join_processes(CPU),
            precision=precision, batch_size=options.batch_size,
        )  # fmt: skip
    assert statistics.pooled is not None
    return statistics.pooled.numpy()


def score_ours(reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Compare features by the package's own functions."""
    real, fake = (torch.from_numpy(each) for each in (reference, samples))
    moments = [value for each in (fake.double(), real.double()) for value in (each.mean(0), each.T.cov())]
    shares = precision_recall(reference=real, samples=fake, num_neighbours=NUM_NEIGHBOURS)
    return {"fd": frechet_distance(*moments), "precision": shares.precision, "recall": shares.recall}


# All ----------------------------------------------------------------------------------------------------------------


def summarize(way: Way, options: Options) -> dict[str, Any]:
    """Scale a way's time to all images and add the scoring."""
    per_image = way.processor_sec / way.num_images
    return {
        "total_sec": per_image * options.num_images + way.scoring_sec,
        "extraction_ms_per_image": 1000 * per_image,
        "extraction_wall_ms_per_image": 1000 * way.wall_sec / way.num_images,
        "scoring_sec": way.scoring_sec,
        "num_images_extracted": way.num_images,
        "figures": way.figures,
    }


def main(options: Options) -> None:
    """Run the benchmark."""
    torch.set_num_threads(options.threads)
    description = describe_machine(__file__, options, device=choose_device("cpu"), packages=("timm", "pillow"))
    images = photographs(options.num_images, options.image_size)
    network, extractor = plain_network(), place(load_features("efficientnet-lite0"), CPU)
    runs: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "plain": lambda share: extract_plainly(network, share),
        "ours": lambda share: extract_ours(extractor, "fp32", options, share),
        "ours, bf16": lambda share: extract_ours(extractor, "bf16", options, share),
    }
    ways = {name: Way() for name in runs}
    for run in runs.values():  # what is done once
        run(images[: 2 * NUM_NEIGHBOURS])
    for turn in range(options.rounds):
        for name, run in runs.items():
            count = options.num_plain if name == "plain" else options.num_images
            first, stop = turn * count // options.rounds, (turn + 1) * count // options.rounds
            ways[name].extract(run, images[first:stop])
        times = ", ".join(f"{name} {1000 * way.processor_sec / way.num_images:.1f}" for name, way in ways.items())
        print(f"{turn + 1}/{options.rounds} ms per image: {times}", flush=True)
    features = {name: np.concatenate(way.features) for name, way in ways.items()}
    features["plain, scored"] = features["ours"]  # the plain way has extracted too few to be scored
    for name, way in ways.items():
        compared = features["plain, scored" if name == "plain" else name]
        began = time.process_time()
        way.figures = (score_plainly if name == "plain" else score_ours)(compared[::2], compared[1::2])
        way.scoring_sec = time.process_time() - began
    scale = np.abs(features["plain"]).max()
    deviation = {
        name: float(np.abs(features[name][: options.num_plain] - features["plain"]).max() / scale)
        for name in ("ours", "ours, bf16")
    }
    figures = {name: summarize(way, options) for name, way in ways.items()}
    for name, row in figures.items():
        row["times_faster"] = figures["plain"]["total_sec"] / row["total_sec"]
        shown = ", ".join(f"{key} {value:.4f}" for key, value in row["figures"].items())
        print(
            f"{name:12} {row['extraction_ms_per_image']:6.2f} ms per image, scoring {row['scoring_sec']:5.2f} s, "
            f"{options.num_images} images {row['total_sec']:6.1f} s: {row['times_faster']:.2f} times; {shown}"
        )
    print("largest deviation of a feature from the plain way's, of the largest feature:", deviation)
    if options.json is not None:
        content = description | {
            "times_faster": figures["ours, bf16"]["times_faster"],
            "times_faster_fp32": figures["ours"]["times_faster"],
            "largest_deviation": deviation,
            "variants": figures,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
