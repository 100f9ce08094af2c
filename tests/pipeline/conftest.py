"""What the tests of whole commands share: images of two colours, their latents, and short runs on them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.autoencoders import load_autoencoder
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import from_flat

TINY = "untrained:tiny-kl"
TINY_VQ = "untrained:tiny-vq"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach for the network, nor spend seconds on measuring the processor."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("eqvae.runs.train.matrix_peak_flops_per_sec", lambda device, precision: 1e12)


def write_images(folder: Path, names: str, num_images: int = 12, seed: int = 0) -> Path:
    """Write noisy images of 64 px, a colour for each class folder; `names` has a letter for each."""
    random, colours = np.random.default_rng(seed), np.array([[200, 60, 40], [30, 90, 210]])
    for index in range(num_images):
        path = folder / names[index % len(names)].strip() / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = colours[index % len(names)] + random.integers(-20, 20, (64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in the class folders `a` and `b`."""
    return write_images(tmp_path_factory.mktemp("data"), "ab")


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten other images."""
    return write_images(tmp_path_factory.mktemp("other"), "ab", num_images=10, seed=1)


def encode_into(folder: Path, data: Path, autoencoder: str = TINY, **options: object) -> Path:
    settings = {"image_size": 64, "batch_size": 6, "shard_size": 8, "precision": "fp32", "num_workers": 0}
    config = EncodeConfig(autoencoder=autoencoder, data=str(data), out=folder, device="cpu", **settings | options)
    encode(config, load_autoencoder(autoencoder))
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The cache of the twelve images: 4 x 8 x 8, labelled, with mirror images."""
    return encode_into(tmp_path_factory.mktemp("latents") / "cache", data)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The cache of their tokens: 4 x 4 of 1,024 codes."""
    return encode_into(tmp_path_factory.mktemp("tokens") / "cache", data, TINY_VQ, image_size=32)


@pytest.fixture(scope="session")
def unlabelled_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokens without classes and without mirror images."""
    folder = tmp_path_factory.mktemp("unlabelled_tokens")
    images = write_images(folder / "data", " ", num_images=8)
    return encode_into(folder / "cache", images, TINY_VQ, image_size=32, mirror=False)


@pytest.fixture(scope="session")
def unlabelled_latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of images without classes and without mirror images."""
    folder = tmp_path_factory.mktemp("unlabelled")
    return encode_into(folder / "cache", write_images(folder / "data", " ", num_images=8), mirror=False)


@pytest.fixture(scope="session")
def odd_latents(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A cache of 6 x 6 cells."""
    return encode_into(tmp_path_factory.mktemp("odd") / "cache", data, image_size=48)


@pytest.fixture
def configure(latents: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Configures four steps of `dit-ti-4` in fp32; the defaults are as quick as a run can be."""

    def make(name: str = "run", **options: object) -> TrainConfig:
        settings = {
            "recipe": "dit-ti-4", "latents": latents, "out": tmp_path / name, "max_steps": 4, "batch_size": 4,
            "log_every": 1, "checkpoint_every": 2, "sample_every": 100, "watch_steps": 2, "num_watch_samples": 8,
            "precision": "fp32", "device": "cpu", "learning_rate": 1e-3,
        }  # fmt: skip
        return from_flat(TrainConfig, **settings | options)

    return make
