"""Measures of single images (Appendix C of arXiv:2502.09509): equivariance error and token agreement, PSNR and SSIM."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from eqvae.errors import UserError
from eqvae.transforms import ROTATIONS, Interpolation, Transform, evaluation_scales

MAX_PSNR_DB = 100.0
"""Reported for images that are equal in all 8 bits, whose PSNR is infinite."""


def equivariance_error(
    transformed_latent: Float[Tensor, "n c h w"], latent_of_transformed: Float[Tensor, "n c h w"]
) -> Float[Tensor, " n"]:
    """Measure how far `tau o E(x)` is from `E(tau o x)` (Section C.3).

    Args:
        transformed_latent: `tau o E(x)`, raw.
        latent_of_transformed: `E(tau o x)`, raw.

    Returns:
        `||tau o E(x) - E(tau o x)||^2 / ||E(tau o x)||^2` for each image: 0 for an equivariant encoder, about 2 for
        unrelated latents of mean zero.
    """
    a, b = transformed_latent.float().flatten(1), latent_of_transformed.float().flatten(1)
    return (a - b).square().sum(1) / b.square().sum(1)


def token_agreement(tokens: Int64[Tensor, "n h w"], others: Int64[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Compare tokens position by position."""
    return (tokens == others).flatten(1).cpu().double().mean(1)


def evaluation_transforms(interpolation: Interpolation = "bicubic", antialias: bool = False) -> dict[str, Transform]:
    """Name T_r and T_s of Section C.3 as the keys of `metrics.json` do."""
    named: dict[str, Transform] = {f"rotation_{90 * tau.quarter_turns}": tau for tau in ROTATIONS}
    return named | {f"scale_{float(tau.vertical):g}": tau for tau in evaluation_scales(interpolation, antialias)}


def equivariance_figures(
    encode: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n k h w"],
    z: Float[Tensor, "n c h2 w2"],
    transforms: Mapping[str, Transform],
    *,
    tokenize: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Float[Tensor, " n"]]:
    """Measure several transformations of the same images, as `metrics.json` names them."""
    figures = {}
    for name, tau in transforms.items():
        transformed, encoded = tau(z), encode(tau(x))
        figures[f"equivariance_error_{name}"] = equivariance_error(transformed, encoded)
        if tokenize is not None:
            figures[f"token_agreement_{name}"] = token_agreement(tokenize(transformed), tokenize(encoded))
    return figures


def _check_pictures(images: Tensor, reconstructions: Tensor) -> None:
    """Refuse images in [-1, 1], of which figures would look fine and be wrong, and sizes that broadcast."""
    for each in (images, reconstructions):
        if each.dtype != torch.uint8:
            raise UserError(f"images are {str(each.dtype).removeprefix('torch.')}", "Give uint8, 0 ... 255")
    if images.shape != reconstructions.shape:
        shapes = f"{tuple(images.shape)} and {tuple(reconstructions.shape)}"
        raise UserError(f"images have the shapes {shapes}", "Give as many of one size")


def psnr_db(images: UInt8[Tensor, "n k h w"], reconstructions: UInt8[Tensor, "n k h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio of each image (Section C.2).

    Args:
        images: 0 ... 255.
        reconstructions: 0 ... 255.

    Returns:
        Decibels, at most `MAX_PSNR_DB`.
    """
    _check_pictures(images, reconstructions)
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds: no `--help` waits for it

    values = peak_signal_noise_ratio(
        reconstructions.float(), images.float(), data_range=255.0, dim=(1, 2, 3), reduction="none"
    )
    return values.clamp(max=MAX_PSNR_DB)


def ssim(images: UInt8[Tensor, "n k h w"], reconstructions: UInt8[Tensor, "n k h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of each image (Section C.2), Gaussian window of 11 px and sigma 1.5.

    Args:
        images: 0 ... 255.
        reconstructions: 0 ... 255.

    Returns:
        At most 1.
    """
    _check_pictures(images, reconstructions)
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        reconstructions.float() / 255.0, images.float() / 255.0, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)  # a tuple only where the full map is asked for
    return values.reshape(-1)
