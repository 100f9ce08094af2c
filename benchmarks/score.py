"""Scoring images, against one at a time through PNG files.

The peer writes each image as a PNG file, reads it back, resizes it, runs it through EfficientNet-Lite0 by itself in
fp32, and compares features with NumPy. Ours writes one `.npz` and scores it with `eqvae.metrics`. All see the same
crops of the built-in photographs, half of them blurred: these are scored against the others (Frechet distance,
precision, recall).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from benchmarks.harness import Turn, Variant, Work
from eqvae.artifacts.sample_sets import write_sample_set
from eqvae.images import open_images
from eqvae.images.image_sets import open_samples
from eqvae.metrics.frechet import frechet_distance
from eqvae.metrics.neighbours import precision_recall
from eqvae.metrics.statistics import compute_statistics
from eqvae.networks.features import load_features
from eqvae.networks.pretrained import efficientnet_lite0_weights
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.processes import join_processes

NUM_NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class Score(Work):
    """Scoring images, against one at a time through PNG files."""

    unit = "image"

    num_images: int = 1000
    """Extracted in a turn, half of them samples and half of them reference."""

    image_size: int = 256
    """Side of the images, in px."""

    batch_size: int = 64
    """Of ours."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "one by one": Variant(lambda _: self.one_by_one()),
            "ours": Variant(lambda _: self.ours("fp32")),
            "ours, bf16": Variant(lambda _: self.ours("bf16"), "bf16"),
        }

    def photographs(self) -> np.ndarray:
        """Cut random squares out of the built-in photographs; every second one is blurred."""
        source, random = open_images("photos"), np.random.default_rng(0)
        whole = [source.read(index) for index in range(len(source))]
        images = np.empty((self.num_images, self.image_size, self.image_size, 3), dtype=np.uint8)
        for index in range(self.num_images):
            image = whole[random.integers(len(whole))]
            left, top = (int(random.integers(side - self.image_size + 1)) for side in image.size)
            crop = image.crop((left, top, left + self.image_size, top + self.image_size))
            images[index] = np.asarray(crop.filter(ImageFilter.GaussianBlur(1.0)) if index % 2 else crop)
        return images

    def one_by_one(self) -> Turn:
        """Prepare timm's network as it comes."""
        images, device = self.photographs(), choose_device(self.device)
        network = timm.create_model("efficientnet_lite0").eval()
        network.load_state_dict(efficientnet_lite0_weights())
        network.reset_classifier(0)
        network.to(device)

        @torch.no_grad()
        def take_turn() -> dict[str, Any]:
            rows = []
            with tempfile.TemporaryDirectory() as folder:
                for index, image in enumerate(images):
                    Image.fromarray(image).save(Path(folder) / f"{index:06}.png")
                for path in sorted(Path(folder).iterdir()):
                    x = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float()
                    x = F.interpolate(x.to(device), (224, 224), mode="bilinear", antialias=True)
                    rows.append(network((x - 127) / 128).cpu().numpy())
            features = np.concatenate(rows)
            return {"units": len(images), **compare_plainly(features[::2], features[1::2])}

        return take_turn

    def ours(self, precision: Precision) -> Turn:
        """Prepare ours."""
        images, device = self.photographs(), choose_device(self.device)
        extractor = place(load_features("efficientnet-lite0"), device)

        def take_turn() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "samples.npz"
                write_sample_set(path, images)
                samples = open_samples(path)
                statistics = compute_statistics(
                    extractor, samples, indices=range(len(samples)), device=device, processes=join_processes(device),
                    precision=precision, batch_size=self.batch_size,
                )  # fmt: skip
            assert statistics.pooled is not None
            real, fake = statistics.pooled[::2], statistics.pooled[1::2]
            moments = [value for each in (fake.double(), real.double()) for value in (each.mean(0), each.T.cov())]
            shares = precision_recall(reference=real, samples=fake, num_neighbours=NUM_NEIGHBOURS)
            figures = {"fd": frechet_distance(*moments), "precision": shares.precision, "recall": shares.recall}
            return {"units": len(images), **figures}

        return take_turn


def compare_plainly(reference: np.ndarray, samples: np.ndarray) -> dict[str, float]:
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
