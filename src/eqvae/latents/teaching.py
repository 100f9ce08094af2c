"""REPA's teacher at work: patch tokens of the very images that a batch's latents encode."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.presets import Recipe
from eqvae.generators.repa import read_teacher_tokens, write_teacher_tokens
from eqvae.images import ImageSource, adm_crop, open_images
from eqvae.latents.cache import LatentCache
from eqvae.networks.teachers import Teacher, load_teacher
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import autocast
from eqvae.runtime.processes import Processes
from eqvae.runtime.progress import Progress

_NUM_THREADS = 4
_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class TeacherTokens:
    """Looks tokens up by image, computing them from the image or reading them from a file."""

    teacher: Teacher | None
    """None where all tokens are in memory."""

    channels: int

    source: ImageSource
    """What was encoded."""

    source_indices: Int64[Tensor, " n"]
    """Where the cache's images stand in it."""

    image_size_px: int

    device: torch.device

    stored: dict[str, Tensor]
    """`tokens` and `mirrored` of all images; empty where they are computed on the fly."""

    def tokens(self, indices: Int64[Tensor, " n"], mirrored: Bool[Tensor, " n"]) -> Float[Tensor, "n tokens channels"]:
        """Tokens of some images."""
        if self.teacher is None:
            plain, flipped = self.stored["tokens"][indices], self.stored.get("mirrored")
            return (plain if flipped is None else torch.where(mirrored[:, None, None], flipped[indices], plain)).float()
        images = self.images(indices)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        with autocast(self.device, "bf16"):
            return self.teacher(images.to(self.device)).float()

    def images(self, indices: Int64[Tensor, " n"]) -> UInt8[Tensor, "n 3 h w"]:
        """Read images as `eqvae encode` cropped them."""

        def read(index: int) -> np.ndarray:
            return adm_crop(self.source.read(index), self.image_size_px)

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            arrays = list(pool.map(read, self.source_indices[indices].tolist()))
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def teach(config: TrainConfig, cache: LatentCache, recipe: Recipe, processes: Processes) -> TeacherTokens:
    """Set up the teacher of a REPA run."""
    data = config.data or cache.index.data
    source = open_images(data)
    if source.fingerprint() != cache.index.data_fingerprint:
        raise UserError(
            f"'{data}' holds other images than those that '{config.latents}' encodes",
            "Name the encoded images with --data",
        )
    _, height, width = cache.latent_shape
    grid = (height // recipe.patch_size, width // recipe.patch_size)
    teacher = load_teacher(config.teacher, grid=grid, weights=config.teacher_weights).to(processes.device)
    on_the_fly = TeacherTokens(
        teacher=teacher,
        channels=teacher.channels,
        source=source,
        source_indices=cache.source_indices(),
        image_size_px=cache.index.image_size_px,
        device=processes.device,
        stored={},
    )
    return _stored(on_the_fly, teacher, config, cache, processes) if config.cache_teacher else on_the_fly


def _stored(
    tokens: TeacherTokens, teacher: Teacher, config: TrainConfig, cache: LatentCache, processes: Processes
) -> TeacherTokens:
    """Read all tokens from the file beside the latents; the first process writes it where it is not there yet."""
    rows, columns = teacher.grid
    path = config.latents / f"teacher-{config.teacher.replace('/', '-')}-{rows}x{columns}.safetensors"
    if processes.is_first and not path.exists():
        kinds = (False, True) if cache.index.has_mirrored else (False,)
        computed = []
        with Progress("teacher", total=len(kinds) * len(cache), unit="image") as progress:
            for is_mirrored in kinds:
                parts = []
                for indices in torch.arange(len(cache)).split(_BATCH_SIZE):
                    flags = torch.full((len(indices),), is_mirrored)
                    parts.append(tokens.tokens(indices, flags).bfloat16().cpu())
                    progress.advance(len(indices))
                computed.append(torch.cat(parts))
        write_teacher_tokens(
            path, computed[0], teacher=config.teacher, mirrored=computed[1] if len(computed) > 1 else None
        )
    processes.wait()
    return replace(
        tokens, teacher=None, stored=read_teacher_tokens(path, teacher=config.teacher, num_images=len(cache))
    )
