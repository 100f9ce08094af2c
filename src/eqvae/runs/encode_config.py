"""The configuration of an encoding run. Every field is a flag of `eqvae encode`."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from eqvae.errors import UserError
from eqvae.latents.coding import MomentsDtype
from eqvae.runtime.device import Precision
from eqvae.runtime.run_folder import AT_LEAST_1, NOT_NEGATIVE, check_ranges


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

    def command(self) -> str:
        """Write the command line that makes the same cache, without `--out` and what changes no result."""
        words = ["eqvae", "encode", self.autoencoder, "--data", self.data]
        for each in fields(self):
            value, flag = getattr(self, each.name), each.name.replace("_", "-")
            if each.name in _NAMED_OTHERWISE or value == each.default:
                continue
            words += (
                [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            )
        return shlex.join(words)


_NAMED_OTHERWISE = frozenset(("autoencoder", "data", "out", "device", "num_workers"))


def check_same_cache(saved: dict[str, Any], config: EncodeConfig, fingerprint: str, data_fingerprint: str) -> None:
    """Refuse to mix two caches in one folder; data and autoencoders may have moved meanwhile."""
    mend = "Choose another --out, or remove that folder"
    for name, own, now in (
        ("fingerprint", "autoencoder", fingerprint),
        ("data_fingerprint", "data", data_fingerprint),
    ):
        if saved.get(name) != now:
            before, other = saved.get(own), getattr(config, own)
            what = f"{own} '{before}'" + (f", not '{other}'" if before != other else ", which has changed since")
            raise UserError(f"--out '{config.out}' holds a latent cache of {what}", mend)
    for name in ("image_size", "num_images", "shard_size", "mirror", "dtype", "precision", "label_column"):
        if saved.get(name) != getattr(config, name):
            raise UserError(
                f"--out '{config.out}' holds a latent cache with --{name.replace('_', '-')} {saved.get(name)}, "
                f"not {getattr(config, name)}",
                mend,
            )
