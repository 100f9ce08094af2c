"""`eqvae encode`: an autoencoder and images in, a latent cache out.

Shards are dealt to processes in turn. A batch never crosses a shard's border, so that the cache's bytes do not depend
on how many processes wrote it or where it was interrupted; shards that are whole are kept.
"""

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from eqvae.artifacts.files import read_journal
from eqvae.artifacts.names import CACHE_INDEX, METRICS
from eqvae.artifacts.weights import WhichWeights
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.loading import choose_weights
from eqvae.autoencoders.padding import check_reflection, padding_mode_of
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.autoencoders.tiling import check_tile, in_tiles
from eqvae.errors import UserError
from eqvae.images import ImageSize, ImageSource, Pixels, RangeConfig, open_images
from eqvae.images.sizes import (
    Buckets,
    bucket_sizes,
    describe_buckets,
    read_sizes,
    sort_into_buckets,
    split_by_size,
    summarize_buckets,
    write_sizes,
)
from eqvae.latents.writing import MomentsDtype, Recipe, coding_of
from eqvae.metrics.autoencoder import check_image_size
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.journal import Journal, say
from eqvae.runtime.processes import join_processes
from eqvae.runtime.run_folder import AT_LEAST_1, NOT_NEGATIVE, RunFolder, check_ranges, flat_fields, flat_value
from eqvae.runtime.signals import stop_on_signals

_NAMED_OTHERWISE = frozenset(("autoencoder", "data", "out", "device", "num_workers"))
_FIXED = (
    "image_size", "aspect_buckets", "tile", "shard_size", "mirror", "dtype", "precision", "label_column",
    "image_column", "white", "black",
)  # fmt: skip
_SHOWN = ("latent_mean", "latent_std")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Write an autoencoder's latents of images and mirror images into a cache for generators."""

    autoencoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AUTOENCODER")]
    """Preset, hub id or path; a fine-tuning run's folder stands for the model it exported."""

    data: str
    """`photos`, an image folder, `*.parquet`, tar shards or `hf:NAME[/CONFIGURATION][:SPLIT]`."""

    out: Path
    """Output folder; the same command run again keeps the shards that are whole and makes the others."""

    weights: WhichWeights | None = None
    """Of a checkpoint that holds both: `ema`, averaged, or `raw`. None: the averaged ones, and one line says so.
    `AUTOENCODER#raw` says the same."""

    image_size: int | str = 256
    """Side of the centre crops, in px (ADM's preprocessing); `192x256` for height x width; or several, as in
    `128,192,256`: images are dealt out to those of their aspect in turn."""

    aspect_buckets: bool = False
    """Cut each image to the nearest of several aspects up to 1:2, with about as many pixels as --image-size squared."""

    tile: int | None = None
    """Encode pictures that are larger than this side, in px, in tiles of it: bounds memory."""

    num_images: int | None = None
    """The first images of the data; None: all. More than a finished cache holds lengthen it."""

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

    image_column: str | None = None
    """Column of a table, or ending of an archive's members (`mask.png`), that holds the images; None: the usual one."""

    value_range: Annotated[RangeConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RangeConfig)

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    num_workers: int | None = None
    """Processes that read images ahead; 0 reads in this process; None: 1 on a CPU, else this process's cores."""

    def check(self, stride: int) -> None:
        """Check what can be checked without reading data."""
        check_ranges(self, ((AT_LEAST_1, ("num_images", "batch_size", "shard_size")), (NOT_NEGATIVE, ("num_workers",))))
        check_tile(self.tile, stride)
        for sizes in self.sizes(stride):
            for size in sizes:
                check_image_size(size, stride)

    def sizes(self, stride: int) -> list[tuple[ImageSize, ...]]:
        """List the sizes of crops by buckets; sides of buckets are whole patches of two cells."""
        sizes = read_sizes(self.image_size)
        return bucket_sizes(sizes, aspect_buckets=self.aspect_buckets, unit_px=2 * stride)

    def command_line(self) -> str:
        """Write the command line that makes the same cache, without `--out` and what changes no result."""
        words = ["eqvae", "encode", self.autoencoder, "--data", self.data]
        for each in flat_fields(type(self)):
            value, flag = flat_value(self, each.name), each.name.replace("_", "-")
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
    from eqvae.runs.encode_run import EncodeRun  # its file reads the configuration of this one

    config = replace(
        config, autoencoder=choose_weights(config.autoencoder, config.weights), weights=None,
        image_size=write_sizes(read_sizes(config.image_size)),
    )  # fmt: skip
    device = choose_device(config.device)
    source = open_images(config.data, label_column=config.label_column, image_column=config.image_column)
    source = source.labelled_up_to(config.num_images or len(source))  # classes are those that are seen
    folder = RunFolder.claim(config.out, "encode")
    autoencoder = autoencoder or load_autoencoder(config.autoencoder)  # last: it may be gigabytes from the hub
    config.check(autoencoder.stride)
    shortest_px = min(min(size) for sizes in config.sizes(autoencoder.stride) for size in sizes)
    check_reflection(padding_mode_of(autoencoder), shortest_px // autoencoder.stride)
    source = source.read_as(Pixels(channels=autoencoder.image_channels, range=config.value_range))
    processes = join_processes(device)
    num_images = _count_images(config, source)
    buckets = sort_into_buckets(source, config.sizes(autoencoder.stride), processes, num_images=num_images)
    recipe = plan(config, autoencoder, source, buckets, (folder.saved or {}).get("data_fingerprint"))
    identity = {"fingerprint": recipe.fingerprint, "data_fingerprint": recipe.data_fingerprint}
    _check_same_cache(folder, config, identity)
    anew = (CACHE_INDEX, METRICS) if _is_longer(folder, config) else ()
    source.announce("DATA", processes, describe_buckets(buckets))
    with (
        folder.hold(config, processes, seed=None, anew=anew, **identity),
        stop_on_signals() as stop,
        in_tiles(autoencoder, config.tile),
    ):
        run = EncodeRun(
            config=config, recipe=recipe, source=source, processes=processes, stop=stop,
            autoencoder=place(autoencoder, processes.device).eval(), journal=Journal(config.out),
        )  # fmt: skip
        if processes.is_first:
            run.journal.write("data", **source.summary(), **summarize_buckets(buckets))
        kept = run.keep_whole_shards()
        run.num_records = len(read_journal(config.out))
        run.num_kept = sum(processes.gather(kept))  # waits for all: from here on, a shard that is there is whole
        run.began_sec = time.monotonic()
        run.encode_missing_shards()
        return run.finish() if processes.is_first else None


def _count_images(config: EncodeConfig, source: ImageSource) -> int:
    num_images = len(source) if config.num_images is None else config.num_images
    if num_images > len(source):
        raise UserError(f"--num-images {num_images} asks for more than the {len(source)} images of '{config.data}'")
    return num_images


def plan(
    config: EncodeConfig, autoencoder: Autoencoder, source: ImageSource, buckets: Buckets, known: str | None = None
) -> Recipe:
    """Determine the cache that a configuration stands for; `known` is the fingerprint of its data, if it has begun."""
    return Recipe(
        coding=coding_of(autoencoder, config.dtype),
        visited_by_size=tuple(split_by_size(buckets)),
        stride=autoencoder.stride,
        latent_channels=autoencoder.latent_channels,
        autoencoder=config.autoencoder,
        fingerprint=autoencoder.fingerprint(),
        encoder_fingerprint=autoencoder.encoder_fingerprint(),
        data=config.data,
        data_fingerprint=source.fingerprint_like(known),
        class_names=source.class_names,
        classes=source.class_indices,
        image_column=config.image_column,
        pixels=source.pixels,
        mirror=config.mirror,
        precision=config.precision,
        shard_size=config.shard_size,
        command=config.command_line(),
    )


def _check_same_cache(folder: RunFolder, config: EncodeConfig, identity: Mapping[str, str]) -> None:
    """Refuse to mix two caches in one folder; data and autoencoders may have moved meanwhile."""
    saved, mend = folder.saved or {}, "Choose another --out, or remove that folder"
    for name, own in (("fingerprint", "autoencoder"), ("data_fingerprint", "data")):
        if not folder.differs(**{name: identity[name]}):
            continue
        before, other = saved.get(own), getattr(config, own)
        if own == "data" and before == other and not (config.out / CACHE_INDEX).exists():
            # As when it was refused for a broken image, which has been removed as advised.
            say(f"'{other}' has changed since: the shards that were made of it are made again")
            continue
        what = f"{own} '{before}'" + (f", not '{other}'" if before != other else ", which has changed since")
        raise UserError(f"--out '{config.out}' holds a latent cache of {what}", mend)
    defaults = {field.name: field.default for field in flat_fields(EncodeConfig)}
    for name in _FIXED:
        now = flat_value(config, name)
        before = saved.get(name, defaults[name])  # it may be older than the field
        if folder.saved is not None and before != now:
            flag = name.replace("_", "-")
            raise UserError(f"--out '{config.out}' holds a latent cache with --{flag} {before}, not {now}", mend)


def _is_longer(folder: RunFolder, config: EncodeConfig) -> bool:
    """Whether a cache of the first images is to hold more of them: its last shard is made again. Refuses fewer."""
    if not folder.differs(num_images=config.num_images):
        return False
    before = (folder.saved or {})["num_images"]
    if before is None or (config.num_images is not None and config.num_images < before):
        raise UserError(
            f"--out '{config.out}' holds a latent cache with --num-images {before}, not {config.num_images}",
            "Choose another --out, or remove that folder",
        )
    return True
