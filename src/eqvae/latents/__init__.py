"""Latents on disk: what an autoencoder makes of images, written once and read many times."""

from eqvae.latents.batches import training_batches, training_token_batches
from eqvae.latents.cache import LatentBatch, LatentCache, TokenBatch, check_autoencoder
from eqvae.latents.index import CacheIndex
from eqvae.latents.normalization import Normalization

__all__ = [
    "CacheIndex",
    "LatentBatch",
    "LatentCache",
    "Normalization",
    "TokenBatch",
    "check_autoencoder",
    "training_batches",
    "training_token_batches",
]
