"""Latents as pictures, their top three principal components as red, green and blue (Figure 1 of arXiv:2502.09509).

Each autoencoder's channels are standardized first, because fine-tuning moves the latents' scale and a mere change of
scale must not show. Autoencoders with equally many channels then share one projection and one colour scale; where the
channel counts differ, colours have nothing to do with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

PERCENTILES = (0.01, 0.99)
"""What of a latent map falls outside is clipped, so that a few extreme cells do not wash out the rest."""


@dataclass(frozen=True, kw_only=True)
class LatentPainter:
    """Gives each cell of an autoencoder's latents its colour: the same for latents that are moved or decoded later."""

    mean: Float64[Tensor, " c"]
    std: Float64[Tensor, " c"]
    directions: Float64[Tensor, "c k"]
    low: Float64[Tensor, " k"]
    high: Float64[Tensor, " k"]

    def paint(self, latent: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n 3 h w"]:
        """Draw each cell as one pixel."""
        n, _, height, width = latent.shape
        components = _standardize(_cells(latent), self.mean, self.std) @ self.directions
        stretched = (components - self.low) / (self.high - self.low).clamp_min(1e-12)
        stretched = torch.where(self.high > self.low, stretched, 0.5).clamp(0.0, 1.0)
        colours = torch.nn.functional.pad(stretched, (0, 3 - stretched.shape[1]), value=0.5)
        return (colours * 255.0).round().to(torch.uint8).reshape(n, height, width, 3).movedim(-1, 1).contiguous()


def latent_painters(latents: Sequence[Float[Tensor, "_ _ _ _"]]) -> list[LatentPainter]:
    """Choose the colours by these latents, one painter for each autoencoder."""
    cells = [_cells(latent) for latent in latents]
    moments = [(cell.mean(0), (cell - cell.mean(0)).square().mean(0).sqrt()) for cell in cells]
    painters: dict[int, LatentPainter] = {}
    for channels in {cell.shape[1] for cell in cells}:
        members = [index for index, cell in enumerate(cells) if cell.shape[1] == channels]
        together = torch.cat([_standardize(cells[index], *moments[index]) for index in members])
        directions = _principal_directions(together)
        ordered = (together @ directions).sort(0).values
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in PERCENTILES)
        for index in members:
            mean, std = moments[index]
            painters[index] = LatentPainter(mean=mean, std=std, directions=directions, low=low, high=high)
    return [painters[index] for index in range(len(cells))]


def latent_maps(latents: Sequence[Float[Tensor, "_ _ _ _"]]) -> list[UInt8[Tensor, "_ 3 _ _"]]:
    """Draw the latents by which the colours are chosen."""
    return [painter.paint(latent) for painter, latent in zip(latent_painters(latents), latents, strict=True)]


def _cells(latent: Float[Tensor, "n c h w"]) -> Float64[Tensor, "m c"]:
    return latent.detach().cpu().double().movedim(1, -1).flatten(0, 2)


def _standardize(
    cells: Float64[Tensor, "m c"], mean: Float64[Tensor, " c"], std: Float64[Tensor, " c"]
) -> Float64[Tensor, "m c"]:
    """Each channel with mean 0 and standard deviation 1; a constant channel is all zeros."""
    return torch.where(std > 1e-12, (cells - mean) / std.clamp_min(1e-12), 0.0)


def _principal_directions(cells: Float64[Tensor, "m c"]) -> Float64[Tensor, "c k"]:
    """The leading eigenvectors of the covariance, three at most."""
    covariance = cells.T @ cells / len(cells)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :3]
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that colours never invert between runs.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * largest.sign()
