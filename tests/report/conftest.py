"""Small evaluation and run folders, as earlier stages write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqvae.artifacts import JOURNAL, PICTURES, SPECTRUM, Pictures, write_json

TRANSFORMS = {"90°": (32, 32), "s = 0.5": (16, 16)}
"""Names and the sizes of the transformed pictures, px."""

BASE = {"equivariance_error_rotation": 0.9, "equivariance_error_scale": 0.8, "psnr_db": 26.0, "ssim": 0.7}
FIGURE_3 = ("scale_0.25", "scale_0.5", "scale_0.75", "rotation_90", "rotation_180", "rotation_270", "rotation")
BASE_ALL = {"intrinsic_dimension": 62.24, "intrinsic_dimension_standard_error": 0.41, "spectrum_excess_db": 7.31}
FINETUNED_ALL = {"intrinsic_dimension": 39.42, "intrinsic_dimension_standard_error": 0.33, "spectrum_excess_db": -2.1}
"""What `eqvae evaluate --all` adds, besides the Frechet distances."""

FINETUNED = {"equivariance_error_rotation": 0.477, "equivariance_error_scale": 0.384, "psnr_db": 25.7, "ssim": 0.7}


def make_pictures(seed: int = 0, channels: int = 4) -> Pictures:
    """Random pictures of the same two images for every seed."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    own = torch.Generator().manual_seed(seed)
    transformed = [
        tuple(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=own) for size in TRANSFORMS.values())
        for _ in range(2)
    ]
    return Pictures(
        images=images,
        latents=torch.randn(2, channels, 4, 4, generator=own),
        reconstructions=images.clone(),
        encoded_transformed=transformed[0],
        decoded_transformed=transformed[1],
        transforms=tuple(TRANSFORMS),
    )


@pytest.fixture
def pictures() -> Callable[..., Pictures]:
    """`make_pictures`."""
    return make_pictures


@pytest.fixture
def write_evaluation(tmp_path: Path) -> Callable[..., Path]:
    """Write an evaluation folder: `write("base", pictures=..., config={...}, **metrics)`."""

    def write(
        name: str, pictures: Pictures | None = None, config: dict[str, Any] | None = None, **metrics: float
    ) -> Path:
        folder = tmp_path / name
        settings = {"command": "evaluate", "autoencoder": name, "data": "photos", "image_size": 32, **(config or {})}
        write_json(folder / "config.json", settings)
        write_json(folder / "environment.json", {"torch": "2.8.0", "seed": 0})
        write_json(folder / "metrics.json", {"num_images": 2, "latent_mean_0": 0.1, "latent_std_0": 1.5, **metrics})
        if pictures is not None:
            pictures.write(folder / PICTURES)
        return folder

    return write


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run with both branches, a step that was logged twice, a broken image and a torn last line."""
    folder = tmp_path / "run"
    write_json(folder / "config.json", {"command": "finetune", "autoencoder": "base", "num_steps": 40})
    records: list[dict[str, Any]] = [{"kind": "validation", "step": 0, **BASE}]
    for step in range(1, 41):
        branch = "equivariance" if step % 2 else "plain"
        losses = {
            "reconstruction": 1.0 / step,
            "l1": 0.5 / step,
            "explicit": 0.0,
            "discriminator": 1.0,
            "learning_rate": 1e-4,
        }
        records.append({"kind": "train", "step": step, "branch": branch, **losses})
    records.append({"kind": "train", "step": 40, "branch": "plain", "reconstruction": 77.0, "l1": 0.1})
    records.append({"kind": "broken_image", "step": 3, "name": "cat.jpg"})
    records += [{"kind": "watchdog", "step": step, "message": "the discriminator wins"} for step in range(7)]
    records.append({"kind": "validation", "step": 40, **FINETUNED})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / JOURNAL).write_text(text + '{"kind": "tra')
    return folder


@pytest.fixture
def two_evaluations(write_evaluation: Callable[..., Path]) -> list[Path]:
    """A base autoencoder and its fine-tuned version, on the same images."""
    return [
        write_evaluation("base", make_pictures(0), **BASE),
        write_evaluation("finetuned", make_pictures(1), **FINETUNED),
    ]


def make_distances(*figure_3: float, r: float, i: float, features: str = "fid") -> dict[str, float]:
    """rFID, iFID and Figure 3's distances in the order of `FIGURE_3`, or the same with other features."""
    bars = {f"r{features}_{name}": value for name, value in zip(FIGURE_3, figure_3, strict=True)}
    return {f"r{features}": r, f"i{features}": i, **bars}


def make_spectrum(exponent: float, num_rings: int = 16) -> dict[str, list[float]]:
    """Power that falls with the frequency, the image's with its square; both with a mean of 1."""
    frequency = [0.5 * (ring + 1) / num_rings for ring in range(num_rings)]
    latent, image = ([f**-power for f in frequency] for power in (exponent, 2.0))
    return {
        "frequency": frequency,
        "latent_power": [num_rings * power / sum(latent) for power in latent],
        "image_power": [num_rings * power / sum(image) for power in image],
    }


@pytest.fixture
def full_evaluations(write_evaluation: Callable[..., Path]) -> list[Path]:
    """`two_evaluations` made with --all: the base's Figure 3 is SD-VAE's in the paper."""
    base = make_distances(107.9, 83.4, 52.7, 70.0, 52.6, 70.0, 64.2, r=0.9, i=21.3)
    finetuned = make_distances(25.8, 16.9, 12.4, 3.6, 3.0, 3.6, 3.41, r=0.82, i=13.8)
    config = {"features": "inception", "all": True}
    folders = [
        write_evaluation("base", make_pictures(0), config, **BASE, **BASE_ALL, **base, latent_std=5.5),
        write_evaluation("finetuned", make_pictures(1), config, **FINETUNED, **FINETUNED_ALL, **finetuned),
    ]
    for folder, exponent in zip(folders, (1.0, 1.5), strict=True):
        write_json(folder / SPECTRUM, make_spectrum(exponent))
    return folders


@pytest.fixture
def spectrum() -> Callable[..., dict[str, list[float]]]:
    """`make_spectrum`."""
    return make_spectrum


@pytest.fixture
def frechet_distances() -> Callable[..., dict[str, float]]:
    """`make_distances`."""
    return make_distances
