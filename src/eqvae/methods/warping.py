"""Warps given in coordinates of the frame, -1 to 1: the same map for an image and for its latent."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eqvae.transforms import Compose, Rotate, Transform

Grid = Float[Tensor, "_ h w 2"]
"""For each place of the result where its value is taken from: (x, y), -1 and 1 at the outer edges of the frame."""


def warp(x: Float[Tensor, "n c _ _"], grid: Grid) -> Float[Tensor, "n c h w"]:
    """Look values up bilinearly, in float32; outside the frame they are reflected."""
    grid = grid.to(x.device, torch.float32).expand(len(x), -1, -1, -1)
    found = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return found.to(x.dtype)


def places(height: int, width: int) -> Grid:
    """The centres of cells or pixels: the map that changes nothing."""
    y, x = ((2.0 * torch.arange(side) + 1.0) / side - 1.0 for side in (height, width))
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]


def project(matrix: Float[Tensor, "3 3"], height: int, width: int) -> Grid:
    """Map places by a homography."""
    here = places(height, width)
    there = torch.cat([here, torch.ones_like(here[..., :1])], dim=-1) @ matrix.T
    return there[..., :2] / there[..., 2:]


def draw_matrix(u: Float[Tensor, " 6"], *, is_perspective: bool) -> Float[Tensor, "3 3"]:
    """Make an affine or a perspective map of six numbers in [-1, 1]; zeros change nothing."""
    matrix = torch.eye(3)
    if is_perspective:
        matrix[2, :2] = 0.3 * u[:2]
        return matrix
    cosine, sine = torch.cos(u[0] * math.pi / 6), torch.sin(u[0] * math.pi / 6)
    turn, shear = torch.tensor([[cosine, -sine], [sine, cosine]]), torch.tensor([[1.0, 0.1 * u[2]], [0.1 * u[3], 1.0]])
    matrix[:2, :2] = 1.25 ** u[1] * turn @ shear
    matrix[:2, 2] = 0.2 * u[4:]
    return matrix


@dataclass(frozen=True, kw_only=True)
class Motion(Transform):
    """Any rotation about the centre, then any shift: bilinear, reflected at the borders. Not in the paper."""

    degrees: float = 0.0
    """Counter-clockwise, as `Rotate`."""

    right: float = 0.0
    """In widths of the frame."""

    down: float = 0.0
    """In heights of the frame."""

    def __call__(self, x: Tensor) -> Tensor:
        """Look up where each place comes from; see `Transform`."""
        height, width = x.shape[-2:]
        cosine, sine = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        back = torch.tensor([[cosine, -sine * height / width], [sine * width / height, cosine]])
        matrix = torch.eye(3)
        matrix[:2, :2], matrix[:2, 2] = back, back @ torch.tensor([-2.0 * self.right, -2.0 * self.down])
        return warp(x, project(matrix, height, width))

    def __str__(self) -> str:
        """For example `12.5°` or `shift (0.1, -0.25)`, right and down."""
        parts = [f"shift ({self.right:.3g}, {self.down:.3g})"] if self.right or self.down else []
        return " · ".join([*parts, *([f"{self.degrees:.3g}°"] if self.degrees else [])]) or "identity"


def turn(degrees: float) -> Transform:
    """Rotate by any angle, counter-clockwise: exactly by quarter turns, the rest as `Motion` does."""
    quarter_turns, rest = divmod(degrees % 360.0, 90.0)
    return Compose(*([Rotate(int(quarter_turns))] if quarter_turns else []), *([Motion(degrees=rest)] if rest else []))


def is_inside(grid: Grid, stride: int) -> Float[Tensor, "_ 1 h2 w2"]:
    """1 for the pixels of cells whose source lies within the frame, else 0; `grid` is that of the latent."""
    inside = (grid.abs() <= 1.0).all(-1)[:, None].float()
    return inside.repeat_interleave(stride, -2).repeat_interleave(stride, -1)


def shift_by_phase(z: Float[Tensor, "n c h w"], down: float, right: float) -> Float[Tensor, "n c h w"]:
    """Shift by parts of cells: each frequency's phase turns; circular."""
    height, width = z.shape[-2:]
    turns = down * torch.fft.fftfreq(height)[:, None] + right * torch.fft.fftfreq(width)
    phase = torch.exp(-2j * torch.pi * turns).to(z.device)
    return torch.fft.ifft2(torch.fft.fft2(z.float()) * phase).real.to(z.dtype)
