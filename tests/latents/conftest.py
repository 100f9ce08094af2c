"""What the latents' tests share: class folders of small images, and caches of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.autoencoders.protocol import Autoencoder
from eqvae.latents.cache import LatentCache
from eqvae.runs.encode import EncodeConfig, encode


@pytest.fixture
def write_images() -> Callable[..., Path]:
    """Write images of 24 x 20 px into the class folders `a` and `b`, in turn; some of them broken."""

    def write(folder: Path, num_images: int = 10, broken: tuple[int, ...] = ()) -> Path:
        random = np.random.default_rng(0)
        for index in range(num_images):
            path = folder / "ab"[index % 2] / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            if index in broken:
                path.write_bytes(b"broken")
            else:
                Image.fromarray(pixels).save(path)
        return folder

    return write


@pytest.fixture
def data(tmp_path: Path, write_images: Callable[..., Path]) -> Path:
    """A folder of ten images of two classes."""
    return write_images(tmp_path / "data")


@pytest.fixture
def config_for(data: Path) -> Callable[..., EncodeConfig]:
    """Configure an encoding of the ten images into shards of 4, 4 and 2, in fp32 throughout."""

    def configure(out: Path, **options: object) -> EncodeConfig:
        settings = {
            "autoencoder": "small", "data": str(data), "out": out, "image_size": 16, "batch_size": 3, "shard_size": 4,
            "precision": "fp32", "dtype": "float32", "device": "cpu", "num_workers": 0,
        }  # fmt: skip
        return EncodeConfig(**settings | options)

    return configure


@pytest.fixture
def make_cache(
    config_for: Callable[..., EncodeConfig], tmp_path: Path, small_autoencoder: Autoencoder
) -> Callable[..., LatentCache]:
    """Encode and open."""

    def make(name: str = "cache", autoencoder: Autoencoder = small_autoencoder, **options: object) -> LatentCache:
        encode(config_for(tmp_path / name, **options), autoencoder)
        return LatentCache.open(tmp_path / name)

    return make
