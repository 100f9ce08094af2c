"""Spatial transformations `tau` that act alike on an image and on its latent.

This file needs PyTorch only; copy it into any training loop:

    tau = TransformSampler().draw(z.shape[-2:], generator).tau
    loss = reconstruction_loss(tau(x), decoder(tau(encoder(x))))

`tau = S(sx, sy) . R(theta)` is Equation 6 of arXiv:2502.09509: rotate by a multiple of 90 degrees, then scale down. A
scale is an exact fraction `k / side_in_latent_cells`, so the scaled latent has `k` cells, the scaled image exactly
`k * stride` pixels, and the decoded latent and the transformed image meet pixel for pixel.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]
ScaleKind = Literal["isotropic", "anisotropic", "none"]


class Transform(ABC):
    """A spatial transformation: a callable on (n, c, h, w) tensors, images and latents alike."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Transform images or latents (Equation 2).

        Args:
            x: (n, c, h, w), any number of channels.

        Returns:
            (n, c, h', w') of the same type.

        Raises:
            ValueError: If the transformed grid would not be whole.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The name that figures print."""


@dataclass(frozen=True)
class Scale(Transform):
    """S(sx, sy): resize by exact fractions."""

    vertical: Fraction
    """sy: new height / old height."""

    horizontal: Fraction
    """sx: new width / old width."""

    interpolation: Interpolation = "bicubic"
    """Bicubic in the paper, bilinear in the released code."""

    antialias: bool = False
    """Low-pass before the reduction; off in the paper's measures and in the released code."""

    def __call__(self, x: Tensor) -> Tensor:
        """Resize; see `Transform`."""
        # In whole numbers, which torch.compile can follow.
        height, more_rows = divmod(x.shape[-2] * self.vertical.numerator, self.vertical.denominator)
        width, more_columns = divmod(x.shape[-1] * self.horizontal.numerator, self.horizontal.denominator)
        if more_rows or more_columns or min(height, width) < 1:
            raise ValueError(f"{self} does not map a grid of {x.shape[-2]} x {x.shape[-1]} to a whole grid")
        if (height, width) == tuple(x.shape[-2:]):
            return x
        # Under autocast, and for 16-bit latents, the weights of the kernel would lose digits: resize in float32.
        exact = x if x.dtype == torch.float64 else x.float()
        resized = F.interpolate(
            exact, size=(height, width), mode=self.interpolation, antialias=self.antialias, align_corners=False
        )
        return resized.to(x.dtype)

    def __str__(self) -> str:
        """For example `s = 0.5`, or `s = (0.5, 0.75)` where height and width differ."""
        if self.vertical == self.horizontal:
            return f"s = {float(self.vertical):.3g}"
        return f"s = ({float(self.vertical):.3g}, {float(self.horizontal):.3g})"


@dataclass(frozen=True)
class Rotate(Transform):
    """R(theta) for multiples of 90 degrees, counter-clockwise: exact, without interpolation or empty corners."""

    quarter_turns: int
    """theta / 90 degrees."""

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate; see `Transform`."""
        return torch.rot90(x, self.quarter_turns, dims=(-2, -1))

    def __str__(self) -> str:
        """For example `90°`."""
        return f"{90 * (self.quarter_turns % 4)}°"


@dataclass(frozen=True)
class Compose(Transform):
    """`Compose(a, b)(x) = a(b(x))`, read as the paper's `a . b`; without parts it is the identity."""

    parts: tuple[Transform, ...]

    def __init__(self, *parts: Transform) -> None:
        """Compose.

        Args:
            *parts: The last is applied first.
        """
        object.__setattr__(self, "parts", parts)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the parts from right to left; see `Transform`."""
        for part in reversed(self.parts):
            x = part(x)
        return x

    def __str__(self) -> str:
        """The parts' names, or `identity`."""
        return " · ".join(str(part) for part in self.parts) or "identity"


IDENTITY = Compose()
"""Leaves images and latents as they are: the plain branch, Equation 1."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one training step does: `L(tau o x', D(tau o E(x')))` with `x' = before(x)`."""

    tau: Transform = IDENTITY
    """Acts on the latent and on the target; the identity in the plain branches."""

    before: Transform = IDENTITY
    """Acts on the image before it is encoded: the released code's low-resolution plain branch, else the identity."""

    branch: Literal["equivariance", "plain", "low-resolution plain"] = "plain"


@dataclass(frozen=True, kw_only=True)
class TransformSampler:
    """Draws `tau` for a training step: the paper's choice, or a preset changed by `dataclasses.replace`."""

    equivariance_probability: float = 0.5
    """Probability of the equivariance branch; otherwise tau is the identity (Equation 7). The paper's `p_alpha` is
    the probability of the plain branch."""

    scale: ScaleKind = "isotropic"
    """`S(s, s)`, `S(sx, sy)`, or no scaling (Table 5)."""

    min_scale: float = 0.25
    """Scales are uniform between this and 1, snapped to whole latent cells."""

    rotation_probability: float = 1.0
    """Probability of rotating, by 90, 180 or 270 degrees alike; otherwise the equivariance branch only scales."""

    interpolation: Interpolation = "bicubic"
    """Bicubic in the paper, bilinear in the released code."""

    antialias: bool = False
    """Low-pass before scaling down."""

    low_resolution_probability: float = 0.0
    """Probability, within the plain branch, of training on a downscaled image; not in the paper, 0.25 in the released
    code."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a probability or the smallest scale is outside its range, or a word is not known.
        """
        for name, known in (("scale", get_args(ScaleKind)), ("interpolation", get_args(Interpolation))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it is one of {', '.join(known)}")
        for name in ("equivariance_probability", "rotation_probability", "low_resolution_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, but a probability lies in [0, 1]")
        if not 0.0 < self.min_scale < 1.0:
            raise ValueError(f"min_scale is {self.min_scale}, but a scale lies strictly between 0 and 1")

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler, a second of every start
    def draw(self, latent_size: tuple[int, int], generator: torch.Generator | None = None) -> Draw:
        """Draw the branch and the transformation of one step (Equations 6 and 7).

        Args:
            latent_size: Height and width of the latent, in cells.
            generator: Source of the randomness, on any device; the same number of values is drawn whatever the branch.

        Returns:
            The branch and its transformations.
        """
        device = generator.device if generator is not None else "cpu"
        drawn = torch.rand(5, generator=generator, dtype=torch.float32, device=device)
        branch, resolution, turn, vertical, horizontal = drawn.tolist()
        if self.scale == "isotropic":
            horizontal = vertical
        if branch < self.equivariance_probability:
            # R acts first, so S sees the rotated grid: height and width have changed places after a quarter turn.
            turns = 1 + int(3 * turn / self.rotation_probability) if turn < self.rotation_probability else 0
            grid = latent_size[::-1] if turns % 2 else latent_size
            parts: list[Transform] = []
            if self.scale != "none":
                parts.append(self._scale(grid, vertical, horizontal))
            if turns:
                parts.append(Rotate(turns))
            return Draw(tau=Compose(*parts), branch="equivariance")
        if resolution < self.low_resolution_probability:
            return Draw(before=self._scale(latent_size, vertical, horizontal), branch="low-resolution plain")
        return Draw()

    def smallest_side(self, latent_side: int) -> int:
        """Work out how small a grid can become.

        Args:
            latent_side: Cells.

        Returns:
            Cells of the smallest grid that `draw` can ask for.
        """
        scales = self.scale != "none" and self.equivariance_probability > 0
        return self._smallest(latent_side) if scales or self.low_resolution_probability > 0 else latent_side

    def _smallest(self, side: int) -> int:
        return min(math.ceil(self.min_scale * side), max(side - 1, 1))

    def _scale(self, grid: tuple[int, int], vertical: float, horizontal: float) -> Scale:
        """Map two uniform numbers in [0, 1) to scales in [min_scale, 1), snapped down to whole cells."""

        def snap(side: int, uniform: float) -> Fraction:
            scale = self.min_scale + (1.0 - self.min_scale) * uniform
            return Fraction(max(math.floor(scale * side), self._smallest(side)), side)

        return Scale(snap(grid[0], vertical), snap(grid[1], horizontal), self.interpolation, self.antialias)


PRESETS: dict[str, TransformSampler] = {
    "paper": TransformSampler(),
    "released-code": TransformSampler(interpolation="bilinear", low_resolution_probability=0.25),
    "plain": TransformSampler(equivariance_probability=0.0),
    "rotation": TransformSampler(scale="none"),
    "scale": TransformSampler(rotation_probability=0.0),
    "anisotropic": TransformSampler(scale="anisotropic"),
}
"""Named samplers: the paper's default, the released code's habits, Equation 1 alone, and the rows of Table 5."""

ROTATIONS: tuple[Rotate, ...] = (Rotate(1), Rotate(2), Rotate(3))
"""T_r of Section C.3: 90, 180 and 270 degrees."""


def evaluation_scales(interpolation: Interpolation = "bicubic", antialias: bool = False) -> tuple[Scale, ...]:
    """T_s of Section C.3.

    Args:
        interpolation: How to resize.
        antialias: Whether to low-pass first.

    Returns:
        The scales 0.25, 0.5 and 0.75.
    """
    quarters = (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))
    return tuple(Scale(quarter, quarter, interpolation, antialias) for quarter in quarters)
