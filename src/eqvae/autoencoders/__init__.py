"""Image autoencoders of every family behind one protocol: images in [-1, 1] to raw latents and back.

diffusers is imported when a model is built, not here: it takes seconds.
"""

from eqvae.autoencoders.loading import build_autoencoder, load_autoencoder
from eqvae.autoencoders.presets import PRESETS
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, LatentStatistics, Posterior, Quantized

__all__ = [
    "PRESETS",
    "Autoencoder",
    "DiscreteAutoencoder",
    "LatentStatistics",
    "Posterior",
    "Quantized",
    "build_autoencoder",
    "load_autoencoder",
]
