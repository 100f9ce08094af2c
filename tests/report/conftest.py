"""Small evaluation and run folders, as earlier stages write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqvae.artifacts import JOURNAL, PICTURES, Pictures, write_json

TRANSFORMS = {"90°": (32, 32), "s = 0.5": (16, 16)}
"""Names and the sizes of the transformed pictures, px."""

BASE = {"equivariance_error_rotation": 0.9, "equivariance_error_scale": 0.8, "psnr_db": 26.0, "ssim": 0.7}
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
