"""Radially averaged power spectrum of latents, against the image's: the diagnosis of "diffusability".

Skorokhodov et al. (arXiv:2502.14831) see in spectra of latents more power at high frequencies than images of the same
resolution have, and find that diffusion, which works from coarse to fine, models such latents badly. They draw DCT
coefficients; here is the Fourier power spectrum, which has one radial frequency and a plain unit:

- Every channel is standardized over all images and positions, as a generator sees latents, so that no scale enters.
- `power(f) = mean |FFT(z)|^2 / (h w)` over images, channels and the frequencies of a ring: unit white noise has power
  1 at every frequency, so the curve crosses 1 where noise of the latent's own strength drowns it. No window is applied;
  the seam at the borders enters the latents' and the images' spectrum alike.
- Rings are `1 / min(h, w)` wide, up to 0.5 cycles per cell. Frequency 0 and the corners beyond 0.5 are in no ring.

What latents are compared with is the image averaged over `stride` x `stride` px: on the same grid, so cycle for cycle.
Then an autoencoder whose latent is the shrunk image has no excess at any frequency.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Power by radial frequency."""

    frequency: Float[Tensor, " rings"]
    """Mean of the frequencies in each ring, cycles per cell, in (0, 0.5], ascending, float64."""

    power: Float[Tensor, " rings"]
    """Mean power in each ring, float64; 1 for white noise."""

    num_frequencies: Int[Tensor, " rings"]
    """Points of the FFT grid in each ring. The sum of `num_frequencies * power` over `h w` is the share of the variance
    that lies in the rings (Parseval)."""

    num_images: int


@dataclass(kw_only=True)
class SpectrumSums:
    """Streams a spectrum: add batches, merge what other processes have added, finish.

    Everything is summed in float64, so the result depends on batch sizes by rounding of float64 only.
    """

    size: tuple[int, int] | None = None
    """Height and width of the grid, in cells; None before the first batch."""

    num_images: int = 0

    total: Float[Tensor, " c"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sum of the values, by channel."""

    total_of_squares: Float[Tensor, " c"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    power: Float[Tensor, "c rings"] = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    """Sum of `|FFT|^2 / (h w)` over images and the frequencies of a ring, before standardization."""

    def add(self, x: Float[Tensor, "n c h w"]) -> None:
        values = x.detach().cpu().double()
        size = (x.shape[2], x.shape[3])
        if self.size is None:
            if min(size) < 2:
                raise ValueError(f"a spectrum needs at least 2 x 2 cells; the grid is {size[0]} x {size[1]}")
            self.size = size
            self.total = torch.zeros(x.shape[1], dtype=torch.float64)
            self.total_of_squares = torch.zeros(x.shape[1], dtype=torch.float64)
            self.power = torch.zeros(x.shape[1], min(size) // 2, dtype=torch.float64)
        self._check_same_kind(size, x.shape[1])
        if not bool(values.isfinite().all()):
            raise ValueError("a spectrum needs finite numbers; there are NaN or infinite ones among them")
        self.num_images += len(values)
        self.total += values.sum((0, 2, 3))
        self.total_of_squares += values.square().sum((0, 2, 3))
        power = torch.fft.fft2(values, norm="ortho").abs().square().sum(0).flatten(1)
        rings, _ = _rings(size)
        inside = rings >= 0
        self.power.index_add_(1, rings[inside], power[:, inside])

    def merge(self, other: "SpectrumSums") -> None:
        """Take in what another process has added."""
        if other.size is None:
            return
        if self.size is None:
            self.size, self.num_images = other.size, other.num_images
            self.total, self.total_of_squares = other.total.clone(), other.total_of_squares.clone()
            self.power = other.power.clone()
            return
        self._check_same_kind(other.size, len(other.total))
        self.num_images += other.num_images
        self.total += other.total
        self.total_of_squares += other.total_of_squares
        self.power += other.power

    def spectrum(self) -> Spectrum:
        """Finish."""
        if self.size is None or self.num_images == 0:
            raise ValueError("a spectrum needs at least one image")
        count = self.num_images * self.size[0] * self.size[1]
        mean_square = self.total_of_squares / count
        variance = mean_square - (self.total / count).square()
        # What rounding leaves of a constant channel is no variance: it has no spectrum and is left out.
        varies = variance > 1e-12 * mean_square
        if not bool(varies.any()):
            raise ValueError("no channel varies over images and positions, so there is no spectrum")
        rings, radius = _rings(self.size)
        inside = rings >= 0
        num_rings = self.power.shape[1]
        num_frequencies = torch.bincount(rings[inside], minlength=num_rings)
        standardized = self.power[varies] / variance[varies, None]
        return Spectrum(
            frequency=torch.bincount(rings[inside], radius[inside], minlength=num_rings) / num_frequencies,
            power=standardized.mean(0) / (self.num_images * num_frequencies),
            num_frequencies=num_frequencies,
            num_images=self.num_images,
        )

    def _check_same_kind(self, size: tuple[int, int], num_channels: int) -> None:
        """Refuse to add up different grids."""
        if size != self.size or num_channels != len(self.total):
            raise ValueError(
                f"{num_channels} channels of {size[0]} x {size[1]} cells cannot join a spectrum of "
                f"{len(self.total)} channels of {'no' if self.size is None else ' x '.join(map(str, self.size))} cells"
            )


def images_on_latent_grid(x: Float[Tensor, "n k h w"], stride: int) -> Float[Tensor, "n k h2 w2"]:
    """Shrink images to one value for each latent cell: the mean of its pixels."""
    return avg_pool2d(x if x.dtype == torch.float64 else x.float(), stride)


def excess_db(latents: Spectrum, images: Spectrum) -> Float[Tensor, " rings"]:
    """Compare the spectra of latents and of the images they encode, frequency by frequency."""
    if not torch.equal(latents.frequency, images.frequency):
        raise ValueError(
            f"the latents' spectrum ({len(latents.frequency)} rings) and the images' ({len(images.frequency)} rings) "
            "are of different grids; shrink the images by the autoencoder's stride first"
        )
    if not bool(((latents.power > 0.0) & (images.power > 0.0)).all()):
        raise ValueError("a ratio of spectra needs power at every frequency; a ring of one of them has none")
    return 10.0 * (latents.power / images.power).log10()


def high_frequency_excess_db(latents: Spectrum, images: Spectrum) -> float:
    """Sum up the diagnosis in one figure: how much more power latents have at high frequencies than images."""
    return float(excess_db(latents, images)[latents.frequency > 0.25].mean())


def _rings(size: tuple[int, int]) -> tuple[Int[Tensor, " frequencies"], Float[Tensor, " frequencies"]]:
    """Sort the points of the FFT grid into rings: the ring of each, -1 outside all, and its radial frequency."""
    vertical = torch.fft.fftfreq(size[0], dtype=torch.float64)
    horizontal = torch.fft.fftfreq(size[1], dtype=torch.float64)
    radius = torch.hypot(vertical[:, None], horizontal[None, :]).flatten()
    side = min(size)
    rings = (radius * side + 0.5).floor().long() - 1
    return torch.where((rings >= side // 2) | (radius > 0.5), -1, rings), radius
