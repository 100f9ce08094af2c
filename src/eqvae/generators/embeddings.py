"""What goes into the transformer: patches, times, labels and positions as vectors, as published by DiT."""

import math

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

NUM_FREQUENCIES = 256
MAX_PERIOD = 10_000


class PatchEmbedder(nn.Module):
    """Patches of latents to tokens, row by row."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        """Build the projection."""
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens width"]:
        """Embed."""
        return self.proj(z).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Times to vectors: cosines and sines of 128 frequencies, and two layers."""

    def __init__(self, width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Num[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """Embed."""
        return self.mlp(time_frequencies(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels to vectors; the row after the last class means "no class"."""

    def __init__(self, num_rows: int, width: int) -> None:
        """Build the table."""
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)

    def forward(self, labels: Int64[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """Look up."""
        return self.embedding_table(labels)


def time_frequencies(t: Num[Tensor, " n"]) -> Float[Tensor, "n 256"]:
    """Cosines, then sines, of t times frequencies from 1 down to almost 1 / 10000, as published."""
    half = NUM_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(rows: int, columns: int, width: int) -> Float[Tensor, "tokens width"]:
    """Fixed positions: half of the channels tell the column, half the row; in each half sines, then cosines."""
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
