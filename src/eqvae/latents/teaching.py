"""REPA's teacher at work: patch tokens of the very images that a batch's latents encode."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from eqvae.artifacts.files import fingerprint, read_tensors, write_tensors
from eqvae.errors import UserError
from eqvae.generators.repa import RepaConfig
from eqvae.images import ImageSize, ImageSource, adm_crop, open_images
from eqvae.latents.cache import LatentCache
from eqvae.networks.teachers import Teacher, load_teacher
from eqvae.runtime.device import autocast
from eqvae.runtime.journal import Progress
from eqvae.runtime.processes import Processes, wait_for_file

_NUM_THREADS = 4
_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class TeacherTokens:
    """Looks tokens up by image, computing them from the image or having read them from a file."""

    name: str
    """The teacher's."""

    teacher: Teacher | None
    """None where all tokens are in memory."""

    channels: int

    kept_in: Path | None
    """The file of the tokens of all images; None: they are computed on the fly."""

    has_mirrored: bool
    """Whether it holds those of the mirror images too."""

    source: ImageSource
    """What was encoded."""

    source_indices: Int64[Tensor, " n"]
    """Where the cache's images stand in it."""

    image_size: ImageSize

    device: torch.device

    stored: dict[str, Tensor]
    """`tokens` and `mirrored` of all images; empty where they were not read."""

    def tokens(self, indices: Int64[Tensor, " n"], mirrored: Bool[Tensor, " n"]) -> Float[Tensor, "n tokens channels"]:
        if self.teacher is None:
            plain, flipped = self.stored["tokens"][indices], self.stored.get("mirrored")
            return (plain if flipped is None else torch.where(mirrored[:, None, None], flipped[indices], plain)).float()
        images = self.images(indices)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        with autocast(self.device, "bf16"):
            return self.teacher(images.to(self.device)).float()

    def images(self, indices: Int64[Tensor, " n"]) -> Shaped[Tensor, "n k h w"]:
        """Read images as `eqvae encode` cropped them."""

        def read(index: int) -> np.ndarray:
            return adm_crop(self.source.read(index), self.image_size)

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            arrays = list(pool.map(read, self.source_indices[indices].tolist()))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def read(self, processes: Processes) -> "TeacherTokens":
        """Have all tokens in memory, if they are kept; the first process computes those that were not yet."""
        if self.kept_in is None or self.teacher is None:
            return self
        weights = fingerprint(self.teacher.state_dict().items())
        if processes.is_first and not self.kept_in.exists():
            write_teacher_tokens(self.kept_in, **self._compute(), teacher=self.name, weights=weights)
        wait_for_file(self.kept_in)
        num_images = len(self.source_indices)
        stored = read_teacher_tokens(self.kept_in, teacher=self.name, weights=weights, num_images=num_images)
        return replace(self, teacher=None, stored=stored)

    def _compute(self) -> dict[str, Tensor]:
        """Compute what is `stored` then."""
        kinds = {"tokens": False} | ({"mirrored": True} if self.has_mirrored else {})
        found, num_images = dict[str, Tensor](), len(self.source_indices)
        with Progress("teacher", total=len(kinds) * num_images, unit="image") as progress:
            for kind, is_mirrored in kinds.items():
                parts = []
                for indices in torch.arange(num_images).split(_BATCH_SIZE):
                    flags = torch.full((len(indices),), is_mirrored)
                    parts.append(self.tokens(indices, flags).bfloat16().cpu())
                    progress.advance(len(indices))
                found[kind] = torch.cat(parts)
        return found


def teach(config: RepaConfig, cache: LatentCache, grid: tuple[int, int], processes: Processes) -> TeacherTokens:
    """Describe the teacher of a REPA run, whose tokens have the grid of the transformer's; nothing is computed."""
    data = config.data or cache.index.data
    source = open_images(data, image_column=cache.index.image_column).read_as(cache.index.pixels)
    source.announce("DATA", processes)
    if source.fingerprint_like(cache.index.data_fingerprint) != cache.index.data_fingerprint:
        raise UserError(
            f"'{data}' holds other images than those that '{cache.folder}' encodes",
            "Name the encoded images with --data",
        )
    teacher = load_teacher(config.teacher, grid=grid, weights=config.teacher_weights).to(processes.device)
    (rows, columns), name = teacher.grid, config.teacher
    path = cache.folder / f"teacher-{name.replace('/', '-')}-{rows}x{columns}.safetensors"
    return TeacherTokens(
        name=name,
        teacher=teacher,
        channels=teacher.channels,
        kept_in=path if config.cache_teacher else None,
        has_mirrored=cache.index.has_mirrored,
        source=source,
        source_indices=cache.source_indices(),
        image_size=cache.index.image_size(),
        device=processes.device,
        stored={},
    )


def write_teacher_tokens(
    path: Path,
    tokens: Float[Tensor, "num tokens channels"],
    *,
    teacher: str,
    weights: str,
    mirrored: Float[Tensor, "num tokens channels"] | None = None,
) -> None:
    """Write a teacher's tokens of all images beside their latents, in bfloat16; `weights` is its fingerprint."""
    named = {"tokens": tokens} if mirrored is None else {"tokens": tokens, "mirrored": mirrored}
    stored = {name: value.bfloat16() for name, value in named.items()}
    write_tensors(path, stored, {"teacher": teacher, "weights": weights}, digest=True)


def read_teacher_tokens(path: Path, *, teacher: str, weights: str, num_images: int) -> dict[str, Tensor]:
    """Read what `write_teacher_tokens` wrote."""
    tensors, metadata = read_tensors(path)
    if metadata.get("teacher") != teacher or "tokens" not in tensors:
        raise UserError(f"'{path}' holds tokens of '{metadata.get('teacher')}', not of '{teacher}'", "Remove it")
    if metadata.get("weights") != weights:
        raise UserError(f"'{path}' holds tokens of '{teacher}' with other weights", "Remove it")
    if len(tensors["tokens"]) != num_images:
        raise UserError(
            f"'{path}' holds tokens of {len(tensors['tokens'])} images, the cache has {num_images}", "Remove it"
        )
    return tensors
