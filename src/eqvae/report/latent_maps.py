"""Latents as colours: their top three principal components as red, green and blue (Figure 1 of arXiv:2502.09509)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

PERCENTILES = (0.01, 0.99)
"""What falls outside is clipped, so that a few extreme cells do not wash out the rest."""


def latent_maps(latents: Sequence[Float[Tensor, "_ _ _ _"]]) -> list[UInt8[Tensor, "_ 3 _ _"]]:
    """Draw latents as pictures whose colours can be compared between autoencoders.

    Each autoencoder's channels are standardized first, because fine-tuning moves the latents' scale and a mere change
    of scale must not show. Autoencoders with equally many channels then share one projection and one colour scale;
    where the channel counts differ, colours have nothing to do with each other.
    """
    cells = [_standardized_cells(latent) for latent in latents]
    colours: dict[int, Float64[Tensor, "m 3"]] = {}
    for channels in {cell.shape[1] for cell in cells}:
        members = [index for index, cell in enumerate(cells) if cell.shape[1] == channels]
        painted = _project(torch.cat([cells[index] for index in members]))
        split = painted.split([len(cells[index]) for index in members])
        colours |= dict(zip(members, split, strict=True))
    return [_cells_to_pictures(colours[index], latent) for index, latent in enumerate(latents)]


def _standardized_cells(latent: Float[Tensor, "n c h w"]) -> Float64[Tensor, "m c"]:
    """One row for each cell, each channel with mean 0 and standard deviation 1; a constant channel is all zeros."""
    cells = latent.detach().double().movedim(1, -1).flatten(0, 2)
    centred = cells - cells.mean(0)
    std = centred.square().mean(0).sqrt()
    return torch.where(std > 1e-12, centred / std.clamp_min(1e-12), 0.0)


def _project(cells: Float64[Tensor, "m c"]) -> Float64[Tensor, "m 3"]:
    """Project to the leading eigenvectors of the covariance and stretch each component to [0, 1]."""
    covariance = cells.T @ cells / len(cells)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :3]
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that colours never invert between runs.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = cells @ (directions * largest.sign())
    ordered = components.sort(0).values
    low, high = (ordered[round(share * (len(cells) - 1))] for share in PERCENTILES)
    stretched = torch.where(high > low, (components - low) / (high - low).clamp_min(1e-12), 0.5).clamp(0.0, 1.0)
    return torch.nn.functional.pad(stretched, (0, 3 - stretched.shape[1]), value=0.5)


def _cells_to_pictures(colours: Float64[Tensor, "m 3"], latent: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n 3 h w"]:
    n, _, height, width = latent.shape
    return (colours * 255.0).round().to(torch.uint8).reshape(n, height, width, 3).movedim(-1, 1).contiguous()
