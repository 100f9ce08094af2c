"""REPA: representation alignment, Yu et al., arXiv:2410.06940.

    L = L_velocity - lambda E[ 1/N sum_n cos( y_n, h(hidden_n) ) ]

y are a frozen teacher's patch tokens of the clean image, `hidden` the transformer's tokens after one block, h the
projector. The teacher is handed in: its tokens stand among the step's draws.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.artifacts import read_tensors, write_tensors
from eqvae.errors import UserError
from eqvae.generators.protocol import LatentSpecification, Loss, Objective, Predict

TEACHER_TOKENS = "teacher_tokens"
"""Name of the teacher's tokens (n, tokens, channels) among the draws; the training loop puts them there."""


@dataclass(frozen=True, kw_only=True)
class RepaObjective(Objective):
    """Another objective, and the alignment with a teacher."""

    objective: Objective
    """What is trained besides."""

    depth: int = 8
    """The block whose tokens are aligned, from 1."""

    weight: float = 0.5
    """lambda."""

    def out_channels(self, channels: int) -> int:
        """Ask the wrapped objective; see `Objective`."""
        return self.objective.out_channels(channels)

    def draw(self, num: int, specification: LatentSpecification, generator: torch.Generator) -> dict[str, Tensor]:
        """Ask the wrapped objective; the teacher's tokens are the caller's to add; see `Objective`."""
        return self.objective.draw(num, specification, generator)

    def loss(
        self,
        predict: Predict,
        latents: Float[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"],
        draws: Mapping[str, Tensor],
    ) -> Loss:
        """Add `repa`, minus the mean cosine, to the wrapped objective's parts; see `Objective`.

        `predict` must be a `Transformer` with a projector, or a wrapper of one that passes `depth` on. Without the
        teacher's tokens among the draws (in a validation) the loss is the wrapped objective's.
        """
        if TEACHER_TOKENS not in draws:
            return self.objective.loss(predict, latents, labels, draws)
        projections: list[Tensor] = []

        def remember(z: Tensor, t: Tensor, seen: Tensor) -> Tensor:
            with_depth: Any = predict
            answer = with_depth(z, t, seen, self.depth)
            projections.append(answer.projected)
            return answer.output

        inner = self.objective.loss(remember, latents, labels, draws)
        alignment = -token_cosine(projections[-1], draws[TEACHER_TOKENS], aspect=latents.shape[-2] / latents.shape[-1])
        return Loss(total=inner.total + self.weight * alignment, parts={**inner.parts, "repa": alignment})


def token_cosine(
    projected: Float[Tensor, "n tokens channels"], teacher: Float[Tensor, "n other_tokens channels"], *, aspect: float
) -> Float[Tensor, " n"]:
    """Compare tokens by the cosine of their angle, averaged over the grid."""
    if teacher.shape[1] != projected.shape[1]:
        teacher = resize_tokens(teacher.float(), projected.shape[1], aspect=aspect)
    return F.cosine_similarity(projected.float(), teacher.float(), dim=-1).mean(1)


def resize_tokens(
    tokens: Float[Tensor, "n tokens channels"], num_tokens: int, *, aspect: float
) -> Float[Tensor, "n other_tokens channels"]:
    """Resize a grid of tokens, bilinearly, low-passed where it shrinks."""
    (rows, columns), size = _grid(tokens.shape[1], aspect), _grid(num_tokens, aspect)
    maps = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    resized = F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).transpose(1, 2)


def _grid(num_tokens: int, aspect: float) -> tuple[int, int]:
    rows = round(math.sqrt(num_tokens * aspect))
    if rows < 1 or num_tokens % rows or abs(num_tokens / rows * aspect - rows) > 0.5:
        raise ValueError(f"{num_tokens} tokens fill no grid whose height is {aspect:g} times its width")
    return rows, num_tokens // rows


def write_teacher_tokens(
    path: Path,
    tokens: Float[Tensor, "num tokens channels"],
    *,
    teacher: str,
    mirrored: Float[Tensor, "num tokens channels"] | None = None,
) -> None:
    """Write a teacher's tokens of all images beside their latents, in bfloat16."""
    named = {"tokens": tokens} if mirrored is None else {"tokens": tokens, "mirrored": mirrored}
    write_tensors(path, {name: value.bfloat16() for name, value in named.items()}, {"teacher": teacher})


def read_teacher_tokens(path: Path, *, teacher: str, num_images: int) -> dict[str, Tensor]:
    """Read what `write_teacher_tokens` wrote."""
    tensors, metadata = read_tensors(path)
    if metadata.get("teacher") != teacher or "tokens" not in tensors:
        raise UserError(f"'{path}' holds tokens of '{metadata.get('teacher')}', not of '{teacher}'", "Remove it")
    if len(tensors["tokens"]) != num_images:
        raise UserError(
            f"'{path}' holds tokens of {len(tensors['tokens'])} images, the cache has {num_images}", "Remove it"
        )
    return tensors
