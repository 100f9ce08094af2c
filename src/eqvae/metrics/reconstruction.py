"""Reconstruction measures on 8-bit images: PSNR, SSIM, LPIPS (Section C.2 of arXiv:2502.09509), by torchmetrics."""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MAX_PSNR_DB = 100.0
"""Reported for images that are equal in all 8 bits, whose PSNR is infinite."""


LPIPS_MIN_IMAGE_SIZE_PX = 16
"""The smallest image on which VGG16's four poolings leave a cell."""


def psnr_db(images: UInt8[Tensor, "n 3 h w"], reconstructions: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each image.

    Args:
        images: 0 ... 255.
        reconstructions: 0 ... 255.

    Returns:
        Decibels, at most `MAX_PSNR_DB`.
    """
    values = peak_signal_noise_ratio(
        reconstructions.float(), images.float(), data_range=255.0, dim=(1, 2, 3), reduction="none"
    )
    return values.clamp(max=MAX_PSNR_DB)


def ssim(images: UInt8[Tensor, "n 3 h w"], reconstructions: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of each image, Gaussian window of 11 px and sigma 1.5.

    Args:
        images: 0 ... 255.
        reconstructions: 0 ... 255.

    Returns:
        At most 1.
    """
    values = structural_similarity_index_measure(
        reconstructions.float() / 255.0, images.float() / 255.0, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)  # a tuple only where the full map is asked for
    return values.reshape(-1)


def lpips_is_cached() -> bool:
    """Whether the VGG16 backbone of LPIPS lies in PyTorch's local cache (its linear heads come with torchmetrics)."""
    return any(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth"))


class Lpips(nn.Module):
    """Learned perceptual distance with VGG16, frozen; differentiable, so it serves as a loss as well as a measure."""

    def __init__(self) -> None:
        """Load the backbone from PyTorch's local cache or the network."""
        super().__init__()
        self.network = _load_lpips_network().requires_grad_(False).eval()

    def forward(self, x: Float[Tensor, "n 3 h w"], y: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """Compare images."""
        return self.network(x, y, normalize=False).reshape(-1)


def _load_lpips_network() -> nn.Module:
    from urllib.error import URLError

    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    from eqvae.errors import UserError

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    except (URLError, OSError) as error:
        raise UserError(
            f"LPIPS needs VGG16's ImageNet weights, which are neither in '{torch.hub.get_dir()}/checkpoints' nor "
            f"to be had from the network ({error})",
            "Put vgg16-397923af.pth there, or use --perceptual efficientnet-lite0, which works offline",
        ) from None
