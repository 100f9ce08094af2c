"""A sampling run: draws a sample set in parts that survive an interruption, and puts them into one .npz."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from eqvae.artifacts import (
    CONFIG,
    METRICS,
    claim_output_folder,
    hold_output_folder,
    read_json,
    read_tensors,
    to_plain,
    write_atomically,
    write_json,
    write_tensors,
)
from eqvae.artifacts.adm_archive import SAMPLES, write_sample_set
from eqvae.errors import Interrupted, UserError
from eqvae.generators.export import GeneratorCard
from eqvae.runtime.journal import write_environment
from eqvae.runtime.processes import Processes
from eqvae.runtime.run_folder import check_same_run
from eqvae.runtime.signals import stop_on_signals
from eqvae.sampling.config import FREE_TO_CHANGE
from eqvae.sampling.draw import Drawer

SHEET = "samples.png"
PARTS = "parts"

IMAGES_PER_PART = 256
"""An interruption loses at most so many images of each process."""

_SHEET_SIDE = 10


def sample(drawer: Drawer, processes: Processes) -> dict[str, Any]:
    """Draw a sample set, or go on where an earlier call stopped."""
    config = replace(drawer.config, num_steps=drawer.num_steps)
    identity = to_plain(config) | {"command": "sample", "generator": to_plain(drawer.generator.card)}
    saved = claim_output_folder(config.out, "sample")
    if saved is not None:
        check_same_run(saved, config, FREE_TO_CHANGE)
        if GeneratorCard.from_plain(saved["generator"]) != drawer.generator.card:  # or older, with fewer fields
            raise UserError(
                f"'{config.out}' holds samples of '{config.run}' at step {saved['generator']['num_steps']}, not "
                f"{drawer.generator.card.num_steps}",
                "Choose another --out, or remove that folder",
            )
        if (config.out / METRICS).exists():
            return read_json(config.out / METRICS)
    processes.wait()
    if processes.is_first:
        config.out.mkdir(parents=True, exist_ok=True)
    with hold_output_folder(config.out, hold=processes.is_first):
        if processes.is_first:
            write_json(config.out / CONFIG, identity)
            write_environment(config.out, device=drawer.device, seed=config.seed)
        processes.wait()
        rate = _draw_parts(drawer, processes)
        processes.wait()
        figures = {"num_samples": config.num_samples, "images_per_sec": float(sum(processes.gather(rate)))}
        if processes.is_first:
            _join_parts(drawer)
            write_json(config.out / METRICS, figures)
            shutil.rmtree(config.out / PARTS)  # last: a process killed before goes on from them
        processes.wait()
        return figures


def contact_sheet(images: UInt8[torch.Tensor, "n 3 h w"], path: Path, *, num_columns: int = _SHEET_SIDE) -> None:
    """Draw images side by side."""
    from torchvision.utils import make_grid

    grid = make_grid(images.cpu(), nrow=num_columns, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    write_atomically(path, lambda temporary: picture.save(temporary, format="png"))


def sheet_indices(num_samples: int, num_classes: int) -> list[int]:
    """Choose the images of a contact sheet: with balanced labels, a row for each of the first classes."""
    num_rows = min(num_classes, _SHEET_SIDE) if num_classes > 1 else 0
    by_class = [row + num_classes * column for row in range(num_rows) for column in range(_SHEET_SIDE)]
    if by_class and max(by_class) < num_samples:
        return by_class
    return list(range(min(num_samples, _SHEET_SIDE**2)))


def _draw_parts(drawer: Drawer, processes: Processes) -> float:
    """Draw this process's parts that are not there yet; returns images per second."""
    config = drawer.config
    parts = range(0, config.num_samples, IMAGES_PER_PART)[processes.rank :: processes.count]
    num_own = sum(len(_indices(config.num_samples, first)) for first in parts)
    num_drawn, began_sec = 0, time.perf_counter()
    with stop_on_signals() as stop, processes.progress("sample", total=num_own, unit="image") as progress:
        for first in parts:
            indices, path = _indices(config.num_samples, first), _part(config.out, first)
            if not path.exists():
                images = []
                for start in range(0, len(indices), config.batch_size):
                    batch = indices[start : start + config.batch_size]
                    images.append(drawer.images(batch).permute(0, 2, 3, 1).cpu())
                    num_drawn += len(batch)
                    if stop:
                        raise Interrupted(f"{stop.signal_name}; the same command goes on from '{config.out}'")
                write_tensors(path, {"images": torch.cat(images)})
            if progress is not None:
                progress.advance(len(indices))
    return num_drawn / (time.perf_counter() - began_sec)


def _join_parts(drawer: Drawer) -> None:
    """Write the .npz and the contact sheet."""
    config = drawer.config
    size_px = drawer.generator.card.image_size_px
    whole = config.out / PARTS / "images.npy"
    images = np.lib.format.open_memmap(
        whole, mode="w+", dtype=np.uint8, shape=(config.num_samples, size_px, size_px, 3)
    )
    for first in range(0, config.num_samples, IMAGES_PER_PART):
        part = read_tensors(_part(config.out, first))[0]["images"].numpy()
        images[first : first + len(part)] = part
    has_labels = drawer.num_classes > 0
    labels = drawer.labels(range(config.num_samples)).numpy() if has_labels else None
    write_sample_set(config.out / SAMPLES, images, labels)
    shown = sheet_indices(config.num_samples, drawer.num_classes if config.classes == "balanced" else 0)
    contact_sheet(torch.from_numpy(images[shown]).permute(0, 3, 1, 2), config.out / SHEET)


def _indices(num_samples: int, first: int) -> range:
    return range(first, min(first + IMAGES_PER_PART, num_samples))


def _part(out: Path, first: int) -> Path:
    return out / PARTS / f"{first:08d}.safetensors"
