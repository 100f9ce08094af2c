"""Small folders of all kinds that a report draws, as earlier stages write them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from PIL import Image

from eqvae.artifacts.files import write_json
from eqvae.artifacts.names import JOURNAL, PICTURES, SPECTRUM
from eqvae.artifacts.records import Pictures

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


def make_sheet(path: Path, seed: int, *, cell_px: int = 8, rows: int = 2, columns: int = 10) -> Path:
    """A contact sheet of noise, 2 px between its pictures."""
    size = (3, rows * (cell_px + 2) + 2, columns * (cell_px + 2) + 2)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return path


LITE = "fd_efficientnet_lite0"


@pytest.fixture
def write_training(tmp_path: Path) -> Callable[..., Path]:
    """Write a run as `eqvae train` does: `write("base", values=[9, 6, 5], seed=1, parts={"mse": 1.0})`."""

    def write(
        name: str, values: Sequence[float] = (9.0, 6.0, 5.0), *, autoencoder: str = "tiny-kl", key: str = LITE,
        parts: Mapping[str, float] = MappingProxyType({"mse": 1.0}), **fields: Any,
    ) -> Path:  # fmt: skip
        folder, every = tmp_path / name, 10
        config = {
            "command": "train", "recipe": "sit-ti-2", "latents": f"latents/{autoencoder}", "out": str(folder),
            "latents_fingerprint": f"digest of {autoencoder}", "max_steps": every * len(values), "batch_size": 4,
            "learning_rate": 1e-4, "ema_decay": 0.999, "seed": 0, "reference": "photos",
            "features": "efficientnet-lite0", "num_watch_samples": 50, "watch_steps": 8,
        }  # fmt: skip
        card = {"recipe": "sit-ti-2", "autoencoder": autoencoder, "shift": [0.1], "scale": [1.2], "image_size_px": 8}
        records: list[dict[str, Any]] = []
        for step in range(1, every * len(values) + 1):
            losses = {"loss": 1.0 / step, **{part: weight / step for part, weight in parts.items()}}
            pace = {"gradient_norm": 0.5, "images_per_sec": 100.0 + step, "training_sec": 0.5 * step}
            records.append({"kind": "train", "step": step, **losses, **pace, "share_of_peak": 0.1})
            if step % every == 0:
                distance = {} if key == "" else {key: values[step // every - 1], "num_samples": 50}
                records.append({"kind": "validation", "step": step, "training_sec": 0.5 * step, **distance})
                make_sheet(folder / "samples" / f"step_{step:07d}.png", step)
        write_json(folder / "config.json", config | fields)
        write_json(folder / "environment.json", {"device": "cpu (test)"})
        write_json(folder / "generator" / "generator.json", card)
        write_json(folder / "metrics.json", {"num_steps": every * len(values), "num_parameters": 2_500_000})
        (folder / JOURNAL).write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return write


@pytest.fixture
def write_samples(tmp_path: Path) -> Callable[..., Path]:
    """Write a sample set as `eqvae sample` does: `write("drawn", recipe="dit-ti-2", guidance_scale=1.5)`."""

    def write(name: str, *, recipe: str = "sit-ti-2", cell_px: int = 8, **fields: Any) -> Path:
        folder = tmp_path / name
        config = {
            "command": "sample", "run": "runs/sit", "num_samples": 5000, "num_steps": 250, "seed": 3, "sampler": None,
            "classes": "balanced", "guidance_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, "weights": "ema",
            "generator": {"recipe": recipe, "autoencoder": "tiny-kl", "num_steps": 4000, "image_size_px": cell_px},
        }  # fmt: skip
        write_json(folder / "config.json", config | fields)
        write_json(folder / "metrics.json", {"num_samples": 5000, "images_per_sec": 70.0})
        make_sheet(folder / "samples.png", 0, cell_px=cell_px, rows=10)
        return folder

    return write


@pytest.fixture
def write_score(tmp_path: Path) -> Callable[..., Path]:
    """Write a score as `eqvae score` does: `write("score", samples="runs/drawn/samples.npz", fid=12.3, ...)`."""

    def write(
        name: str, *, samples: str = "runs/drawn/samples.npz", reference: str = "data/test.parquet",
        features: str = "inception", num_samples: int = 5000, **figures: float,
    ) -> Path:  # fmt: skip
        folder = tmp_path / name
        config = {"command": "score", "samples": samples, "reference": reference, "features": features}
        source = {"data": reference, "fingerprint": f"digest of {reference}", "features": features}
        provenance = {
            "samples": {"data": samples}, "reference": {**source, "image_size_px": 32}, "num_neighbours": 3,
            "left_out": [],
        }  # fmt: skip
        counts = {"num_samples": num_samples, "num_reference": 10000}
        write_json(folder / "config.json", config)
        write_json(folder / "metrics.json", {**figures, **counts, "provenance": provenance})
        return folder

    return write
