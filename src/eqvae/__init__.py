"""EQ-VAE: equivariance-regularized latent spaces for image generation (arXiv:2502.09509).

from eqvae import TransformSampler, load_autoencoder

autoencoder = load_autoencoder("tiny-kl")
draw = TransformSampler().draw(latent_size=(32, 32))
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eqvae.autoencoders import build_autoencoder, load_autoencoder
    from eqvae.autoencoders.protocol import Autoencoder, Posterior
    from eqvae.equivariance import Decoded, decode_transformed, eq_vae_loss, equivariance_loss
    from eqvae.metrics.equivariance import equivariance_error
    from eqvae.metrics.reconstruction import psnr_db, ssim
    from eqvae.report import write_report
    from eqvae.runs.evaluate import EvaluateConfig, evaluate
    from eqvae.transforms import Compose, Draw, Rotate, Scale, TransformSampler

_HOME = {
    "Compose": "eqvae.transforms",
    "Draw": "eqvae.transforms",
    "Rotate": "eqvae.transforms",
    "Scale": "eqvae.transforms",
    "TransformSampler": "eqvae.transforms",
    "Decoded": "eqvae.equivariance",
    "decode_transformed": "eqvae.equivariance",
    "eq_vae_loss": "eqvae.equivariance",
    "equivariance_loss": "eqvae.equivariance",
    "Autoencoder": "eqvae.autoencoders.protocol",
    "Posterior": "eqvae.autoencoders.protocol",
    "build_autoencoder": "eqvae.autoencoders",
    "load_autoencoder": "eqvae.autoencoders",
    "EvaluateConfig": "eqvae.runs.evaluate",
    "evaluate": "eqvae.runs.evaluate",
    "equivariance_error": "eqvae.metrics.equivariance",
    "psnr_db": "eqvae.metrics.reconstruction",
    "ssim": "eqvae.metrics.reconstruction",
    "write_report": "eqvae.report",
}
"""Public names and where they are; imported when first used, since diffusers and torchmetrics take seconds."""

__all__ = [
    "Autoencoder",
    "Compose",
    "Decoded",
    "Draw",
    "EvaluateConfig",
    "Posterior",
    "Rotate",
    "Scale",
    "TransformSampler",
    "build_autoencoder",
    "decode_transformed",
    "eq_vae_loss",
    "equivariance_error",
    "equivariance_loss",
    "evaluate",
    "load_autoencoder",
    "psnr_db",
    "ssim",
    "write_report",
]

try:
    __version__ = version("eqvae")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'eqvae' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
