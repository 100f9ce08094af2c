"""Encoding into a latent cache, against a script that takes one image after the other.

The peer is what generators' repositories tell their users to run before training: eager fp32 in PyTorch's default
layout, one `.npy` of posterior moments for each image and each mirror image. Ours is `encode` with its defaults (bf16,
channels-last, shards with digests), from the image files to the finished index. Both encode the same pictures with the
same weights (untrained: speed does not depend on them) and crop by the same function. Loading the model and hashing its
weights, which both would do once, is left out.
"""

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Turn, Variant, Work
from eqvae.autoencoders.loading import build_autoencoder
from eqvae.images import adm_crop, open_images
from eqvae.latents.cache import LatentCache
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runtime.device import Precision, choose_device, place


@dataclass(frozen=True, kw_only=True)
class Encode(Work):
    """Encoding into a latent cache, against a script that takes one image after the other."""

    unit = "image"

    autoencoder: str = "sd-vae"
    """The preset whose architecture encodes, with random weights."""

    image_size: int = 256
    """Side of the images, in px."""

    num_images: int = 4
    """Images of a turn; each is encoded twice, the second time mirrored."""

    batch_size: int = 4
    """Images at a time of ours; the peer takes one."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "one by one": Variant(self.one_by_one),
            "ours, fp32": Variant(lambda folder: self.ours(folder, "fp32")),
            "ours": Variant(lambda folder: self.ours(folder, "bf16"), "bf16"),
        }

    def one_by_one(self, folder: Path) -> Turn:
        """Encode image after image, and write a file for each and for its mirror image."""
        device, data = choose_device(self.device), write_photographs(folder / "data", self.num_images)
        autoencoder, source = build_autoencoder(self.autoencoder, seed=0).to(device), open_images(str(data))

        @torch.no_grad()
        def take_turn() -> dict[str, Any]:
            for index in range(len(source)):
                pixels = torch.from_numpy(adm_crop(source.read(index), self.image_size))
                x = (pixels.permute(2, 0, 1).float() / 127.5 - 1.0).unsqueeze(0).contiguous().to(device)
                for name, image in (("image", x), ("mirrored", x.flip(-1))):
                    posterior = autoencoder.encode(image)
                    assert posterior.log_variance is not None
                    moments = torch.cat([posterior.mean, torch.exp(0.5 * posterior.log_variance)], 1)
                    np.save(folder / f"{index:06d}-{name}.npy", moments.cpu().numpy())
            return {"units": len(source), "bytes": size_of(folder, ".npy")}

        return take_turn

    def ours(self, folder: Path, precision: Precision) -> Turn:
        """Write latent caches."""
        device, data = choose_device(self.device), write_photographs(folder / "data", self.num_images)
        autoencoder = place(build_autoencoder(self.autoencoder, seed=0), device)
        fingerprint = autoencoder.fingerprint()
        autoencoder.fingerprint = lambda: fingerprint  # type: ignore[method-assign]
        numbers = itertools.count()

        def take_turn() -> dict[str, Any]:
            out = folder / f"latents-{next(numbers)}"
            encode(
                EncodeConfig(
                    autoencoder=self.autoencoder, data=str(data), out=out, image_size=self.image_size,
                    batch_size=min(self.batch_size, self.num_images), precision=precision, device=str(device),
                ),
                autoencoder,
            )  # fmt: skip
            num_bytes = size_of(out, ".safetensors")
            deviation = float(LatentCache.open(out).read(torch.arange(self.num_images)).latents.std())
            shutil.rmtree(out)
            return {"units": self.num_images, "bytes": num_bytes, "latent_std": deviation}

        return take_turn


def write_photographs(folder: Path, num_images: int) -> Path:
    """Write squares of 400 px out of the built-in photographs, as JPEG."""
    folder.mkdir()
    source = open_images("photos")
    for index in range(num_images):
        image = source.read(index % len(source))
        left = (index * 37) % max(1, image.width - 400)
        image.crop((left, 0, left + 400, 400)).save(folder / f"{index:04d}.jpg", quality=95)
    return folder


def size_of(folder: Path, suffix: str) -> int:
    """Count the bytes of files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == suffix)
