"""Put the model that `runs/tiny-kl` exported into the package, in half precision.

    python docs/results/tiny-kl/package.py runs/tiny-kl
"""

import dataclasses
import sys
from pathlib import Path

from eqvae.artifacts import AUTOENCODER, MODEL_CARD, ModelCard, read_json
from eqvae.autoencoders import LatentStatistics, load_autoencoder
from eqvae.autoencoders.presets import PRESETS

run, packaged = Path(sys.argv[1]), PRESETS["tiny-kl"].packaged
assert packaged is not None
packaged.mkdir(parents=True, exist_ok=True)
card = ModelCard(**read_json(run / AUTOENCODER / MODEL_CARD))
autoencoder = load_autoencoder(str(run)).half()
autoencoder.set_latent_statistics(LatentStatistics(mean=tuple(card.latent_mean), std=tuple(card.latent_std)))
autoencoder.save(packaged)
dataclasses.replace(card, fingerprint=load_autoencoder(str(packaged)).fingerprint()).write(packaged)
