"""Named generators: `dit-b-2`, `sit-xl-2`, `repa-sit-xl-2`, ...: a family, a size, a patch size.

Sizes are those of Table 1 of arXiv:2212.09748. `ti` is ours, for CPUs: 4.2 million parameters with ten classes. What a
family fixes is what the published checkpoints of that family were trained with, so that they sample as published.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast

from eqvae.errors import UserError, nearest_name
from eqvae.generators.diffusion import DiffusionObjective, GaussianDiffusion
from eqvae.generators.interpolant import Interpolant, InterpolantObjective, LossWeight
from eqvae.generators.protocol import LatentSpecification, Objective
from eqvae.generators.repa import RepaObjective
from eqvae.generators.transformer import TransformerConfig

Family = Literal["dit", "sit", "repa-sit"]

PATCH_SIZES = (1, 2, 4, 8)

PUBLISHED_LATENTS = LatentSpecification(channels=4, height=32, width=32, num_classes=1000)
"""ImageNet at 256 px: what `Size.num_parameters` refers to."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A transformer's size."""

    depth: int

    hidden_size: int

    num_heads: int

    num_parameters: int
    """With patch size 2, `PUBLISHED_LATENTS` and learned variances."""

    gflops: float
    """Multiply-adds of one forward pass under the same conditions, 1e9."""


# fmt: off
_ROWS = (
    # size  depth width heads parameters   Gflops   Table 4 of arXiv:2212.09748 rounds these
    ("ti",  6,    192,  3,    4_409_888,   0.83),
    ("s",   12,   384,  6,    32_963_360,  6.06),
    ("b",   12,   768,  12,   130_512_416, 23.01),
    ("l",   24,   1024, 16,   458_102_816, 80.71),
    ("xl",  28,   1152, 16,   675_129_632, 118.64),
)
# fmt: on

SIZES: dict[str, Size] = {
    name: Size(depth=depth, hidden_size=width, num_heads=heads, num_parameters=parameters, gflops=gflops)
    for name, depth, width, heads, parameters, gflops in _ROWS
}
"""All sizes by name."""

FAMILIES: tuple[Family, ...] = ("dit", "sit", "repa-sit")
"""DiT's diffusion, SiT's interpolant, and REPA's."""

NAMES: tuple[str, ...] = tuple(
    f"{family}-{size}-{patch_size}" for family in FAMILIES for size in SIZES for patch_size in PATCH_SIZES
)
"""All presets."""

_PATTERN = re.compile(r"(dit|sit|repa-sit)-(\w+)-(\d)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named generator: what to build and what to train it for."""

    family: Family

    size: str
    """One of `SIZES`."""

    patch_size: int
    """Cells."""

    def __str__(self) -> str:
        """The name that `parse_recipe` reads."""
        return f"{self.family}-{self.size}-{self.patch_size}"

    @property
    def interpolant(self) -> Interpolant | None:
        """The published path; None for DiT. REPA's checkpoints run from data at t = 0, SiT's from noise at t = 0."""
        return None if self.family == "dit" else Interpolant(time_of_data=1 if self.family == "sit" else 0)

    @property
    def repa_depth(self) -> int:
        """The block whose tokens REPA aligns: 8; half way where there are no more than 8."""
        depth = SIZES[self.size].depth
        return 8 if depth > 8 else depth // 2

    def objective(
        self,
        num_classes: int,
        *,
        label_dropout: float = 0.1,
        interpolant: Interpolant | None = None,
        weight: LossWeight = "none",
        repa_depth: int | None = None,
        repa_weight: float = 0.5,
    ) -> Objective:
        """Build what the family is trained for."""
        path = interpolant or self.interpolant
        if path is None:
            diffusion = GaussianDiffusion()
            return DiffusionObjective(num_classes=num_classes, diffusion=diffusion, label_dropout=label_dropout)
        objective = InterpolantObjective(
            num_classes=num_classes,
            interpolant=path,
            weight=weight,
            doubled_output=self.family == "sit",
            label_dropout=label_dropout,
        )
        if self.family == "sit":
            return objective
        return RepaObjective(objective=objective, depth=repa_depth or self.repa_depth, weight=repa_weight)

    def transformer(
        self, latents: LatentSpecification, *, qk_norm: bool = False, teacher_channels: int | None = None
    ) -> TransformerConfig:
        """Describe the backbone."""
        size = SIZES[self.size]
        return TransformerConfig(
            latents=latents,
            depth=size.depth,
            hidden_size=size.hidden_size,
            num_heads=size.num_heads,
            patch_size=self.patch_size,
            out_channels=self.objective(latents.num_classes).out_channels(latents.channels),
            qk_norm=qk_norm,
            teacher_channels=teacher_channels,
        )


def parse_recipe(name: str) -> Recipe:
    """Read a preset's name."""
    if name.lower() not in NAMES:
        raise UserError(f"there is no generator '{name}'", nearest_name(name.lower(), NAMES))
    family, size, patch_size = cast(re.Match, _PATTERN.fullmatch(name.lower())).groups()
    return Recipe(family=cast(Family, family), size=size, patch_size=int(patch_size))
