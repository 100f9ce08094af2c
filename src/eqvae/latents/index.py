"""`index.json` of a latent cache: what it holds, its statistics, and which autoencoder made it from what."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.artifacts.files import read_json, to_plain, write_json
from eqvae.artifacts.names import CACHE_INDEX as INDEX
from eqvae.artifacts.names import CONFIG
from eqvae.artifacts.typed import to_record
from eqvae.errors import UserError
from eqvae.images import Pixels, RangeConfig
from eqvae.images.sizes import ImageSize
from eqvae.latents.shards import DTYPES, MIRRORED

VERSION = 2
"""Of the format on disk; 1 is that of caches whose images are one square size, which are still written so."""

PREPROCESSING = "adm-crop"
"""ADM's centre crop, the only one that `eqvae encode` knows."""

_LARGEST = 2**40
"""No count of images, cells, classes or codes is larger."""

_ROWS_AT_A_TIME = 64
"""Float64 takes four times the bytes of what is stored: a shard is summed in pieces."""

Kind = Literal["moments", "tokens"]


@final
@dataclass(frozen=True, kw_only=True)
class LatentMeasures:
    """Per-channel statistics over images, mirror images and positions; raw latents."""

    mean: tuple[float, ...]

    std: tuple[float, ...]
    """Of posterior samples: by the law of total variance, the variance of the means plus the mean of the variances."""

    std_of_means: tuple[float, ...]
    """Of posterior means alone; equal to `std` for a deterministic encoder."""


@final
@dataclass(frozen=True, kw_only=True)
class MomentSums:
    """Sums from which the statistics follow. Those of two sets of latents are added."""

    count: int
    """Values summed in each channel."""

    means: tuple[float, ...]
    """Sum of the posterior means, per channel."""

    squares: tuple[float, ...]
    """Sum of their squares."""

    variances: tuple[float, ...]
    """Sum of the posterior variances; zero for a deterministic encoder."""

    @classmethod
    def of(cls, mean: Float[Tensor, "n c h w"], std: Float[Tensor, "n c h w"] | None) -> "MomentSums":
        """Sum one shard in float64."""
        totals = torch.zeros(3, mean.shape[1], dtype=torch.float64)
        for start in range(0, len(mean), _ROWS_AT_A_TIME):
            means = mean[start : start + _ROWS_AT_A_TIME].double()
            totals[0] += means.sum((0, 2, 3))
            totals[1] += means.square().sum((0, 2, 3))
            if std is not None:
                totals[2] += std[start : start + _ROWS_AT_A_TIME].double().square().sum((0, 2, 3))
        count = mean.shape[0] * mean.shape[2] * mean.shape[3]
        means_sum, squares, variances = (tuple(row) for row in totals.tolist())
        return cls(count=count, means=means_sum, squares=squares, variances=variances)

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "MomentSums":
        """Read what `artifacts.to_plain` made."""
        sums = {name: tuple(content[name]) for name in ("means", "squares", "variances")}
        return cls(count=int(content["count"]), **sums)

    def __add__(self, other: "MomentSums") -> "MomentSums":
        """Add the sums of another set of latents."""

        def add(one: tuple[float, ...], two: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(a + b for a, b in zip(one, two, strict=True))

        return MomentSums(
            count=self.count + other.count,
            means=add(self.means, other.means),
            squares=add(self.squares, other.squares),
            variances=add(self.variances, other.variances),
        )

    def measures(self) -> LatentMeasures:
        """Finish."""
        mean = [total / self.count for total in self.means]
        variance_of_means = [max(total / self.count - m**2, 0.0) for total, m in zip(self.squares, mean, strict=True)]
        variance = [v + total / self.count for v, total in zip(variance_of_means, self.variances, strict=True)]
        return LatentMeasures(
            mean=tuple(mean), std=tuple(v**0.5 for v in variance), std_of_means=tuple(v**0.5 for v in variance_of_means)
        )


@final
@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One file of the cache."""

    file: str

    first: int
    """Index of its first image in the cache."""

    count: int
    """Images in it."""

    sha256: str
    """Digest of its tensors and of what its header says; see `shards.py`."""

    num_bytes: int
    """Size of the file."""

    shape: int = 0
    """Of its latents: a number of `CacheIndex.shapes`."""


@final
@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """A shape of latents or tokens, in cells."""

    height: int

    width: int

    num_images: int
    """Of that shape in the cache."""


@final
@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """What a latent cache holds."""

    version: int

    kind: Kind
    """`moments`: posterior means and standard deviations; `tokens`: indices into a codebook."""

    image_size_px: int
    """Height of the crops; of several shapes that of the most frequent one, as are the two fields of cells."""

    stride: int
    """Pixels per latent cell."""

    latent_channels: int
    """Of the raw latent; for tokens, of the codebook's vectors."""

    latent_height: int

    latent_width: int

    codebook_size: int | None
    """Of tokens; None for moments."""

    num_images: int
    """Without the broken ones."""

    num_broken: int
    """Images of the data that could not be read; the journal names them."""

    num_classes: int | None
    """None where the images have no labels."""

    class_names: tuple[str, ...] | None

    has_mirrored: bool
    """Whether each image's mirror image is there too."""

    has_std: bool
    """Whether the posterior has a width; False for a deterministic encoder and for tokens."""

    dtype: str
    """Of moments or tokens."""

    statistics: LatentMeasures | None
    """Per channel, raw latents; None for tokens."""

    autoencoder: str
    """Preset, hub id or path."""

    fingerprint: str
    """Digest of the autoencoder's weights."""

    preprocessing: str
    """How images became squares."""

    data: str
    """DATA, as it was given."""

    data_fingerprint: str
    """Digest of the images' names and sizes."""

    shard_size: int
    """Images of the data visited for each shard."""

    command: str
    """The command that wrote it and that rebuilds a broken shard, without `--out`."""

    eqvae_version: str

    shards: tuple[ShardEntry, ...]

    image_column: str | None = None
    """Of DATA, where one was asked for."""

    image_channels: int = 3
    """Those that the images were read in."""

    white: float | None = None
    """The number that was stated to be white in images of more than 8 bits."""

    black: float | None = None
    """And black."""

    encoder_fingerprint: str | None = None
    """Digest of the encoder's weights: what binds latents to a decoder; None in older caches."""

    shapes: tuple[LatentShape, ...] = ()
    """All shapes, in the order of their shards; empty in caches of one square size."""

    @property
    def pixels(self) -> Pixels:
        """What the images were read as."""
        return Pixels(channels=self.image_channels, range=RangeConfig(white=self.white, black=self.black))

    def write(self, folder: Path) -> None:
        """Write `index.json` atomically."""
        plain = to_plain(self)
        if not self.shapes:
            del plain["shapes"]
            for entry in plain["shards"]:
                del entry["shape"]
        write_json(folder / INDEX, plain)

    def all_shapes(self) -> tuple[LatentShape, ...]:
        """List the shapes, one at least."""
        only = LatentShape(height=self.latent_height, width=self.latent_width, num_images=self.num_images)
        return self.shapes or (only,)

    def image_size(self) -> ImageSize:
        """Size of the crops; of several the most frequent one's."""
        return ImageSize(self.latent_height * self.stride, self.latent_width * self.stride)

    def rebuild_command(self, folder: Path) -> str:
        """Say how a broken shard is made again; whole ones are kept."""
        return f"{self.command} --out {shlex.quote(str(folder))}"


def expected_tensors(index: CacheIndex, entry: ShardEntry) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List the tensors of a shard."""
    count, own = entry.count, index.all_shapes()[entry.shape]
    shape: tuple[int, ...] = (count, own.height, own.width)
    names = ["tokens"]
    if index.kind == "moments":
        names, shape = ["mean", *(["std"] if index.has_std else [])], (count, index.latent_channels, *shape[1:])
    names += [name + MIRRORED for name in names] if index.has_mirrored else []
    per_image = ["source_indices", *(["labels"] if index.num_classes is not None else [])]
    return dict.fromkeys(names, (index.dtype, shape)) | dict.fromkeys(per_image, ("int64", (count,)))


def read_index(folder: Path) -> CacheIndex:
    """Read and check `index.json`."""
    if not (folder / INDEX).is_file():
        raise _no_index(folder)
    content = read_json(folder / INDEX)
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"'{folder / INDEX}' has format {version}, and this eqvae knows formats up to {VERSION}",
            f"Upgrade eqvae (the cache was written by {content.get('eqvae_version', 'a later version')})",
        )
    try:
        index = to_record(CacheIndex, content)
        _check(index)
    except ValueError as error:
        raise UserError(
            f"'{folder / INDEX}' is damaged ({error})",
            "Remove it and run the same 'eqvae encode' command again: whole shards are kept",
        ) from None
    return index


def _no_index(folder: Path) -> UserError:
    if not folder.exists():
        return UserError(f"'{folder}' does not exist", "Write a latent cache with 'eqvae encode'")
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("command") == "encode":
        return UserError(
            f"The encoding in '{folder}' has not finished", "The same 'eqvae encode' command goes on with it"
        )
    return UserError(f"'{folder}' is no latent cache (it has no {INDEX})", "Write one with 'eqvae encode'")


def _check(index: CacheIndex) -> None:
    """Hold the fields against each other."""
    for field in dataclasses.fields(index):
        value = getattr(index, field.name)
        if isinstance(value, int) and not 0 <= value < _LARGEST:
            raise ValueError(f"{field.name} is {value}")
    if index.dtype not in DTYPES:
        raise ValueError(f"type '{index.dtype}'")
    if index.stride == 0 or index.latent_height * index.stride != index.image_size_px:
        raise ValueError(f"{index.latent_height} cells of {index.stride} px are no {index.image_size_px} px")
    if index.kind == "moments":
        measures = index.statistics
        if measures is None or {len(values) for values in vars(measures).values()} != {index.latent_channels}:
            raise ValueError("statistics do not fit latent_channels")
        if min(measures.std) < 0:
            raise ValueError("a standard deviation is negative")
    elif index.codebook_size is None:
        raise ValueError("tokens without codebook_size")
    _check_shapes(index)
    first = 0
    for entry in index.shards:
        if entry.count < 0 or entry.first != first or Path(entry.file).name != entry.file:
            raise ValueError(f"shard '{entry.file}' begins at {entry.first} instead of {first}")
        first += entry.count
    if first != index.num_images or first == 0:
        raise ValueError(f"num_images is {index.num_images}, and the shards hold {first}")


def _check_shapes(index: CacheIndex) -> None:
    """Hold the shapes against the shards."""
    shapes, found = index.all_shapes(), [0] * len(index.all_shapes())
    for entry in index.shards:
        if not 0 <= entry.shape < len(shapes):
            raise ValueError(f"shard '{entry.file}' has the shape {entry.shape} of {len(shapes)}")
        found[entry.shape] += entry.count
    for shape, count in zip(index.shapes, found, strict=False):
        if not (0 < shape.height < _LARGEST and 0 < shape.width < _LARGEST) or shape.num_images != count:
            raise ValueError(f"{count} images are of the shape {shape.height} x {shape.width}")
    if index.shapes and (index.latent_height, index.latent_width) not in {(s.height, s.width) for s in shapes}:
        raise ValueError("latent_height and latent_width are none of the shapes")
