"""Reconstruction measures on 8-bit images: PSNR and SSIM (Section C.2 of arXiv:2502.09509), by torchmetrics."""

from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MAX_PSNR_DB = 100.0
"""Reported for images that are equal in all 8 bits, whose PSNR is infinite."""


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
