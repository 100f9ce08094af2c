"""How much faster `eqvae encode` caches latents than a plain script, and how fast the cache is read.

    python benchmarks/encode.py [--image-size 256] [--num-images 4] [--repeats 2] [--threads N] [--json FILE]

The reference is what generators' repositories tell their users to run before training: one image after the other, eager
fp32 in PyTorch's default layout, one `.npy` of posterior moments for each image and each mirror image. Ours is
`eqvae.runs.encode.encode` with its defaults (bf16, channels-last, shards with digests), from the image files to the
finished index. Both encode the same pictures with the same weights (untrained: speed does not depend on them), crop
by the same function, and take turns in one process. What both have in common is left out: loading the model, and
hashing its weights.

The reader's rate is that of `training_batches`: random images, flips, posterior samples, normalized, from a cache of
random 32 x 32 x 4 moments.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from eqvae.autoencoders.loading import build_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.images import ImageSize, adm_crop, open_images
from eqvae.latents.batches import training_batches
from eqvae.latents.cache import LatentCache
from eqvae.latents.writing import Coding, Recipe, collect_index, finish_shard
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runtime.device import Precision, choose_device, place, synchronize
from machine import describe_machine


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare encoding with a plain script, at SD-VAE's size, and measure the cache's reader."""

    autoencoder: str = "sd-vae"
    """The preset whose architecture encodes, with random weights."""

    image_size: int = 256
    """Side of the images, in px."""

    num_images: int = 4
    """Images of each measurement; each is encoded twice, the second time mirrored."""

    batch_size: int = 4
    """Images at a time of ours; the reference takes one."""

    repeats: int = 2
    """Times that the variants take turns, after one image for warming up."""

    ablation: bool = True
    """Measure ours in fp32 too."""

    threads: int = os.cpu_count() or 1
    """Threads of PyTorch."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `mps`."""

    num_cached: int = 8192
    """Images of the cache that is read."""

    num_batches: int = 60
    """Batches of 256 latents to read."""

    json: Path | None = None
    """File to write the figures to."""


READER_BATCH = 256


# The reference ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_plainly(autoencoder: Autoencoder, data: Path, out: Path, image_size_px: int, device: torch.device) -> None:
    """Encode image after image, and write a file for each and for its mirror image."""
    out.mkdir()
    source = open_images(str(data))
    for index in range(len(source)):
        pixels = torch.from_numpy(adm_crop(source.read(index), image_size_px))
        x = (pixels.permute(2, 0, 1).float() / 127.5 - 1.0).unsqueeze(0).contiguous().to(device)
        for name, image in (("image", x), ("mirrored", x.flip(-1))):
            posterior = autoencoder.encode(image)
            assert posterior.log_variance is not None
            moments = torch.cat([posterior.mean, torch.exp(0.5 * posterior.log_variance)], 1)
            np.save(out / f"{index:06d}-{name}.npy", moments.cpu().numpy())


# Ours ---------------------------------------------------------------------------------------------------------------


def encode_ours(autoencoder: Autoencoder, data: Path, out: Path, options: Options, precision: Precision) -> None:
    """Write a latent cache."""
    config = EncodeConfig(
        autoencoder=options.autoencoder,
        data=str(data),
        out=out,
        image_size=options.image_size,
        batch_size=options.batch_size,
        precision=precision,
        device=options.device,
    )
    encode(config, autoencoder)


# Measuring ----------------------------------------------------------------------------------------------------------


def compare_encoding(options: Options, folder: Path) -> dict[str, Any]:
    """Let the variants take turns.

    Args:
        options: As given to the command.
        folder: Where images and latents are written.

    Returns:
        Seconds of each turn, rates and the size on disk by variant, and how far bf16 moves the latents.
    """
    device = choose_device(options.device)
    few, data = write_photographs(folder / "few", 1), write_photographs(folder / "data", options.num_images)
    plain = build_autoencoder(options.autoencoder, seed=0).to(device)
    ours = place(build_autoencoder(options.autoencoder, seed=0), device)
    fingerprint = ours.fingerprint()
    ours.fingerprint = lambda: fingerprint  # type: ignore[method-assign]
    names: dict[str, Precision] = {"ours": "bf16"} | ({"ours in fp32": "fp32"} if options.ablation else {})
    turns: dict[str, list[float]] = {name: [] for name in ("reference", *names)}
    num_bytes: dict[str, int] = {}
    for turn in range(options.repeats + 1):  # the first one warms up and is not counted
        images = few if turn == 0 else data
        for name in turns:
            out = folder / f"{name} {turn}"
            gc.collect()
            synchronize(device)
            began_sec = time.perf_counter()
            if name == "reference":
                encode_plainly(plain, images, out, options.image_size, device)
            else:
                encode_ours(ours, images, out, options, names[name])
            synchronize(device)
            sec = time.perf_counter() - began_sec
            if turn > 0:
                turns[name].append(sec)
                num_bytes[name] = sum(
                    file.stat().st_size for file in out.iterdir() if file.suffix in (".npy", ".safetensors")
                )
                print(f"{turn}/{options.repeats} {name}: {sec:.2f} s", flush=True)
    figures: dict[str, Any] = {
        name: {
            "image_sec": statistics.median(secs) / options.num_images,
            "images_per_sec": options.num_images / statistics.median(secs),
            "bytes_per_image": num_bytes[name] / options.num_images,
            "turns_sec": secs,
        }
        for name, secs in turns.items()
    }
    error = relative_error(folder / "reference 1", folder / "ours 1", options.num_images)
    return {"variants": figures, "bf16_relative_error": error}


def write_photographs(folder: Path, num_images: int) -> Path:
    """Write squares of 400 px out of the built-in photographs, as JPEG."""
    folder.mkdir()
    source = open_images("photos")
    for index in range(num_images):
        image = source.read(index % len(source))
        left = (index * 37) % max(1, image.width - 400)
        image.crop((left, 0, left + 400, 400)).save(folder / f"{index:04d}.jpg", quality=95)
    return folder


def relative_error(reference: Path, ours: Path, num_images: int) -> float:
    """Compare the means: root mean square of the difference over that of the reference."""
    cache = LatentCache.open(ours)
    means = cache.normalization.denormalize(cache.read(torch.arange(num_images)).latents)
    channels = means.shape[1]
    files = [reference / f"{index:06d}-image.npy" for index in range(num_images)]
    expected = torch.cat([torch.from_numpy(np.load(file)) for file in files])[:, :channels]
    return float((means - expected).norm() / expected.norm())


def measure_reader(options: Options, folder: Path) -> dict[str, Any]:
    """Read batches of a cache of random moments.

    Args:
        options: As given to the command.
        folder: Where it is written.

    Returns:
        Latents per second by number of reading threads.
    """
    recipe = Recipe(
        visited_by_size=((ImageSize.of(256), range(options.num_cached)),),
        coding=Coding(kind="moments", dtype="float16"), stride=8, latent_channels=4,
        autoencoder="none", fingerprint="none", encoder_fingerprint="none", data="none", data_fingerprint="none",
        class_names=tuple(map(str, range(1000))), mirror=True, precision="bf16",
        shard_size=1024, command="none",
    )  # fmt: skip
    folder.mkdir()
    for number in range(recipe.num_shards):
        visited = list(recipe.shards[number].visited)
        names = ("mean", "std", "mean_mirrored", "std_mirrored")
        kept = {name: torch.rand(len(visited), 4, 32, 32) for name in names}
        labels = [index % 1000 for index in visited]
        finish_shard(folder, recipe, number, kept, source_indices=visited, labels=labels, broken=[])
    collect_index(folder, recipe).write(folder)
    cache = LatentCache.open(folder)
    rates = {}
    for num_threads in (0, 1, 2):
        batches = training_batches(
            cache, batch_size=READER_BATCH, seed=0, num_steps=options.num_batches + 5, num_threads=num_threads
        )
        for _ in range(5):
            next(batches)
        began_sec = time.perf_counter()
        num_read = sum(len(batch.latents) for batch in batches)
        rates[f"{num_threads} threads"] = num_read / (time.perf_counter() - began_sec)
    return {"latent_shape": [4, 32, 32], "batch_size": READER_BATCH, "latents_per_sec": rates}


# Reporting ----------------------------------------------------------------------------------------------------------


def main(options: Options) -> None:
    """Run the benchmark.

    Args:
        options: As given to the command.
    """
    torch.set_num_threads(options.threads)
    options = replace(options, batch_size=min(options.batch_size, options.num_images))
    description = describe_machine(
        __file__, options, device=choose_device(options.device), packages=("diffusers", "safetensors")
    )
    machine = description["machine"]
    print(f"{machine['device']}, load {machine['load_average']:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        encoding = compare_encoding(options, Path(folder))
        reader = measure_reader(options, Path(folder) / "reader")
    variants = encoding["variants"]
    print(f"\n{'':16}{'s / image':>12}{'times faster':>14}{'bytes / image':>15}")
    for name, row in variants.items():
        faster = variants["reference"]["image_sec"] / row["image_sec"]
        print(f"{name:16}{row['image_sec']:12.3f}{faster:14.2f}{row['bytes_per_image']:15.0f}")
    print(f"\nbf16 moves the posterior means by {encoding['bf16_relative_error']:.2%} of their root mean square")
    for name, rate in reader["latents_per_sec"].items():
        print(f"reading 32 x 32 x 4 latents with {name} ahead: {rate:.0f} latents/s")
    faster = variants["reference"]["image_sec"] / variants["ours"]["image_sec"]
    if options.json is not None:
        content = description | {"times_faster": faster} | encoding | {"reader": reader}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nours / reference: {faster:.2f} times faster")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
