"""EQ-VAE: equivariance-regularized latent spaces for image generation (arXiv:2502.09509)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("eqvae")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"
