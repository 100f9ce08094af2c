"""REPA: representation alignment, Yu et al., arXiv:2410.06940.

    L = L_velocity - lambda E[ 1/N sum_n cos( y_n, h(hidden_n) ) ]

y are a frozen teacher's patch tokens of the clean image, `hidden` the transformer's tokens after one block, h the
projector. The teacher is handed in: its tokens stand among the step's draws.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.generators.protocol import Coupling, LatentSpecification, Loss, Objective, Predict

TEACHER_TOKENS = "teacher_tokens"
"""Name of the teacher's tokens (n, tokens, channels) among the draws; the training loop puts them there."""


@dataclass(frozen=True, kw_only=True)
class RepaConfig:
    """How a transformer is aligned with a teacher."""

    owner: ClassVar[str] = "REPA"

    teacher: str = "vit_base_patch14_dinov2.lvd142m"
    """REPA: frozen vision model, `efficientnet-lite0` (offline) or any of timm's."""

    teacher_weights: Path | None = None
    """REPA: file of the teacher's weights; None: the local cache or the network."""

    cache_teacher: bool = False
    """REPA: compute the teacher's tokens of all images once, into a file beside the latents, not at each step."""

    repa_weight: float = 0.5
    """REPA: weight of the alignment."""

    repa_depth: int | None = None
    """REPA: block whose tokens are aligned; None: 8, or half the depth of a smaller transformer."""

    data: str | None = None
    """REPA: the images of the cache, where they are no longer where `eqvae encode` found them."""


@dataclass(frozen=True, kw_only=True)
class RepaObjective(Objective):
    """Another objective, and the alignment with a teacher."""

    objective: Objective
    """What is trained besides."""

    depth: int = 8
    """The block whose tokens are aligned, from 1."""

    weight: float = 0.5
    """lambda."""

    def coupling(self) -> Coupling | None:
        return self.objective.coupling()

    def out_channels(self, channels: int) -> int:
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
