"""`eqvae encode`: an autoencoder and images in, a latent cache out.

Shards are dealt to processes in turn. A batch never crosses a shard's border, so that the cache's bytes do not depend
on how many processes wrote it or where it was interrupted; shards that are whole are kept.
"""

import contextlib
import itertools
import os
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from eqvae.artifacts.files import read_json, write_json
from eqvae.artifacts.names import METRICS
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder, LatentStatistics
from eqvae.errors import Interrupted, UserError
from eqvae.images import ImageBatch, ImageSource, check_broken, encoding_batches, open_images
from eqvae.latents.writing import (
    MomentsDtype,
    Recipe,
    coding_of,
    collect_index,
    encode_crops,
    finish_shard,
    open_whole_shard,
)
from eqvae.metrics.autoencoder import latent_figures
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.journal import Journal
from eqvae.runtime.processes import Processes, StopRequest, join_processes, stop_on_signals
from eqvae.runtime.run_folder import AT_LEAST_1, NOT_NEGATIVE, RunFolder, check_ranges

_POLL_SEC = 0.2
_MAX_WORKERS = 16
_NAMED_OTHERWISE = frozenset(("autoencoder", "data", "out", "device", "num_workers"))
_FIXED = ("image_size", "num_images", "shard_size", "mirror", "dtype", "precision", "label_column")
_SHOWN = ("latent_mean", "latent_std")

_Encoded = tuple[ImageBatch, dict[str, Tensor]]
"""A batch and what is kept of it."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Write an autoencoder's latents of images and mirror images into a cache for generators."""

    autoencoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AUTOENCODER")]
    """Preset, hub id or path; a fine-tuning run's folder stands for the model it exported."""

    data: str
    """`photos`, an image folder, `*.parquet`, tar shards or `hf:NAME[:SPLIT]`."""

    out: Path
    """Output folder; the same command run again keeps the shards that are whole and makes the others."""

    image_size: int = 256
    """Side of the centre crops, in px (ADM's preprocessing)."""

    num_images: int | None = None
    """The first images of the data; None: all."""

    batch_size: int = 32
    """Images at a time; a shard's last batch may be smaller."""

    shard_size: int = 1024
    """Images for each file; an interruption loses the unfinished files."""

    mirror: bool = True
    """Encode the mirror image of each image too."""

    dtype: MomentsDtype = "float16"
    """Of the stored means and standard deviations."""

    precision: Precision = "bf16"
    """Autocast precision of the encoder; `bf16` moves latents by about 0.5% of their deviation (tiny-kl, 128 px), which
    is as much as its posterior is wide."""

    label_column: str | None = None
    """Column of a table that holds the labels; None: look for one; `none`: no labels."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    num_workers: int | None = None
    """Processes that read images ahead; 0 reads in this process; None: 1 on a CPU, else this process's cores."""

    def check(self, stride: int) -> None:
        """Check what can be checked without reading data."""
        check_ranges(
            self,
            ((AT_LEAST_1, ("image_size", "num_images", "batch_size", "shard_size")), (NOT_NEGATIVE, ("num_workers",))),
        )
        if self.image_size % stride:
            below = max(self.image_size // stride, 1) * stride
            raise UserError(
                f"--image-size {self.image_size} is not divisible by the stride {stride}",
                f"Use {below} or {below + stride}, for example",
            )

    def command_line(self) -> str:
        """Write the command line that makes the same cache, without `--out` and what changes no result."""
        words = ["eqvae", "encode", self.autoencoder, "--data", self.data]
        for each in fields(self):
            value, flag = getattr(self, each.name), each.name.replace("_", "-")
            if each.name in _NAMED_OTHERWISE or value == each.default:
                continue
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return shlex.join(words)


def command(config: EncodeConfig) -> str | None:
    """Encode and say what the cache holds."""
    figures = encode(config)
    if figures is None:
        return None
    rate = f" at {figures['images_per_sec']:.3g} images/s" if "images_per_sec" in figures else ""
    latent = ", ".join(f"{name.replace('_', ' ')} {figures[name]:.4f}" for name in _SHOWN if name in figures)
    size = f"{figures['num_images']} images{rate}, {figures['num_bytes'] / 1e6:.1f} MB"
    return f"{size}; {latent or 'tokens'}; cache in '{config.out}'"


def encode(config: EncodeConfig, autoencoder: Autoencoder | None = None) -> dict[str, float | int] | None:
    """Write a latent cache, or what is missing of it; started by torchrun, each process makes every count-th shard.

    Args:
        config: What to encode by what.
        autoencoder: What `config.autoencoder` names, where it is loaded already.

    Returns:
        The figures of `metrics.json`; None in all processes but the first.

    Raises:
        UserError: If the input is wrong, or the folder holds another cache.
        Interrupted: If a signal stopped it; the same call goes on.
    """
    device = choose_device(config.device)
    source = open_images(config.data, label_column=config.label_column)
    folder = RunFolder.claim(config.out, "encode")
    autoencoder = autoencoder or load_autoencoder(config.autoencoder)  # last: it may be gigabytes from the hub
    config.check(autoencoder.stride)
    processes = join_processes(device)
    recipe = plan(config, autoencoder, source)
    identity = {"fingerprint": recipe.fingerprint, "data_fingerprint": recipe.data_fingerprint}
    _check_same_cache(folder, config, identity)
    with folder.hold(config, processes, seed=None, **identity), stop_on_signals() as stop:
        for leftover in config.out.glob(".*.part") if processes.is_first else ():  # of a killed process
            leftover.unlink(missing_ok=True)
        run = EncodeRun(
            config=config, recipe=recipe, source=source, processes=processes, stop=stop,
            autoencoder=place(autoencoder, processes.device).eval(), journal=Journal(config.out),
        )  # fmt: skip
        kept = run.keep_whole_shards()
        run.num_kept = sum(processes.gather(kept))  # waits for all: from here on, a shard that is there is whole
        run.encode_missing_shards()
        return run.finish() if processes.is_first else None


def plan(config: EncodeConfig, autoencoder: Autoencoder, source: ImageSource) -> Recipe:
    """Determine the cache that a configuration stands for."""
    num_images = len(source) if config.num_images is None else config.num_images
    if num_images > len(source):
        raise UserError(f"--num-images {num_images} asks for more than the {len(source)} images of '{config.data}'")
    return Recipe(
        coding=coding_of(autoencoder, config.dtype),
        image_size_px=config.image_size,
        stride=autoencoder.stride,
        latent_channels=autoencoder.latent_channels,
        autoencoder=config.autoencoder,
        fingerprint=autoencoder.fingerprint(),
        encoder_fingerprint=autoencoder.encoder_fingerprint(),
        data=config.data,
        data_fingerprint=source.fingerprint(),
        class_names=source.class_names,
        mirror=config.mirror,
        precision=config.precision,
        num_visited=num_images,
        shard_size=config.shard_size,
        command=config.command_line(),
    )


@dataclass(kw_only=True)
class EncodeRun:
    """One process's part of the encoding."""

    config: EncodeConfig
    recipe: Recipe
    source: ImageSource
    processes: Processes
    stop: StopRequest
    autoencoder: Autoencoder
    journal: Journal
    """All processes append to it, a line at a time."""
    missing: list[int] = field(default_factory=list)
    """This process's shards that have to be made."""
    num_kept: int = 0
    """Images visited for the shards that all processes together found whole."""
    num_broken: int = 0
    """Broken images that this process's kept shards name."""
    began_sec: float = 0.0
    """When encoding began, by the monotonic clock."""

    def keep_whole_shards(self) -> int:
        """See which of this process's shards are whole, and remove what is not."""
        num_kept = 0
        for number in range(self.processes.rank, self.recipe.num_shards, self.processes.count):
            path = self.recipe.path(self.config.out, number)
            existed = path.exists()
            shard = open_whole_shard(path, self.recipe, number) if existed else None
            if shard is not None:
                self.num_broken += len(shard.note["broken"])
                num_kept += len(self.recipe.visited(number))
            else:
                self.missing.append(number)
                path.unlink(missing_ok=True)
                if existed:
                    self.journal.write("broken_shard", file=path.name)
            self._stop_if_asked()
        if num_kept:
            self.journal.write("resume", rank=self.processes.rank, num_images_kept=num_kept)
        return num_kept

    def encode_missing_shards(self) -> None:
        """Make this process's shards; each is written by a thread while the next one is encoded."""
        self.began_sec = time.monotonic()
        size, visited = self.config.batch_size, {number: self.recipe.visited(number) for number in self.missing}
        parts = {number: [v[i : i + size] for i in range(0, len(v), size)] for number, v in visited.items()}
        batches = encoding_batches(
            self.source,
            image_size_px=self.config.image_size,
            parts=[part for own in parts.values() for part in own],
            num_broken=self.num_broken,
            num_workers=self._choose_num_workers(),
        )
        total = sum(map(len, visited.values()))
        with (
            contextlib.closing(batches),
            ThreadPoolExecutor(1) as writer,
            self.processes.progress("encode", total=total, unit="image") as progress,
        ):
            writing = writer.submit(lambda: None)
            for number, own in parts.items():
                made = []
                for batch in itertools.islice(batches, len(own)):
                    made.append(self._encode(batch))
                    if progress is not None:
                        progress.advance(len(batch.indices) + len(batch.broken))
                    if writing.done():
                        writing.result()  # an error of the thread is told now, not a shard later
                    self._stop_if_asked()
                writing.result()
                writing = writer.submit(self._write, number, made)
            writing.result()

    def finish(self) -> dict[str, float | int]:
        """Wait for the other processes' shards, then write the index and the figures."""
        for number in range(self.recipe.num_shards):
            while not self.recipe.path(self.config.out, number).exists():  # torchrun ends us where another one failed
                self._stop_if_asked()
                time.sleep(_POLL_SEC)
        encoding_sec = time.monotonic() - self.began_sec
        index = collect_index(self.config.out, self.recipe)
        check_broken(self.config.data, len(self.source), index.num_broken, "see the journal")
        index.write(self.config.out)
        figures: dict[str, float | int] = {
            "num_images": index.num_images,
            "num_broken": index.num_broken,
            "num_shards": len(index.shards),
            "num_bytes": sum(entry.num_bytes for entry in index.shards),
        }
        if index.statistics is not None:
            figures |= latent_figures(LatentStatistics(mean=index.statistics.mean, std=index.statistics.std))
        num_encoded = self.recipe.num_visited - self.num_kept
        if num_encoded:
            figures |= {"encoding_sec": encoding_sec, "images_per_sec": num_encoded / encoding_sec}
        elif (self.config.out / METRICS).is_file():
            former = read_json(self.config.out / METRICS)
            figures |= {name: former[name] for name in ("encoding_sec", "images_per_sec") if name in former}
        write_json(self.config.out / METRICS, figures)
        return figures

    def _encode(self, batch: ImageBatch) -> _Encoded:
        """Encode images and mirror images; what comes back may still be under way on the device."""
        for broken in batch.broken:
            self.journal.write("broken_image", **broken._asdict())
        device, precision = self.processes.device, self.config.precision
        return batch, encode_crops(self.autoencoder, batch.crops, device, precision, self.config.mirror)

    def _write(self, number: int, made: list[_Encoded]) -> None:
        """Write one shard."""
        # A batch whose images are all broken says nothing, unless no other one does.
        full = [kept for batch, kept in made if batch.indices] or [made[0][1]]
        indices = [index for batch, _ in made for index in batch.indices]
        labelled = self.recipe.class_names is not None
        try:
            path = finish_shard(
                self.config.out,
                self.recipe,
                number,
                {name: torch.cat([kept[name] for kept in full]) for name in full[0]},
                source_indices=indices,
                labels=[self.source.class_of(index) or 0 for index in indices] if labelled else None,
                broken=[broken.name for batch, _ in made for broken in batch.broken],
            )
            self.journal.write("shard", file=path.name, num_images=len(indices))
        except OSError as error:
            raise UserError(
                f"'{self.recipe.path(self.config.out, number)}' can't be written ({error.strerror})",
                "Whole shards are kept: make room and run the same command again",
            ) from None

    def _stop_if_asked(self) -> None:
        if self.stop:
            raise Interrupted(f"{self.stop.signal_name}; the same command goes on from '{self.config.out}'")

    def _choose_num_workers(self) -> int:
        if self.config.num_workers is not None:
            return self.config.num_workers
        if self.processes.device.type == "cpu":
            return 1
        return max(1, min(_MAX_WORKERS, (os.cpu_count() or 1) // self.processes.count))


def _check_same_cache(folder: RunFolder, config: EncodeConfig, identity: Mapping[str, str]) -> None:
    """Refuse to mix two caches in one folder; data and autoencoders may have moved meanwhile."""
    saved, mend = folder.saved or {}, "Choose another --out, or remove that folder"
    for name, own in (("fingerprint", "autoencoder"), ("data_fingerprint", "data")):
        if folder.differs(**{name: identity[name]}):
            before, other = saved.get(own), getattr(config, own)
            what = f"{own} '{before}'" + (f", not '{other}'" if before != other else ", which has changed since")
            raise UserError(f"--out '{config.out}' holds a latent cache of {what}", mend)
    for name in _FIXED:
        if folder.differs(**{name: getattr(config, name)}):
            raise UserError(
                f"--out '{config.out}' holds a latent cache with --{name.replace('_', '-')} {saved.get(name)}, "
                f"not {getattr(config, name)}",
                mend,
            )
