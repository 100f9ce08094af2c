"""Where an exported autoencoder comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqvae.artifacts.files import MODEL_CARD, write_json


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """`eqvae.json` beside an exported autoencoder: where it comes from and what was measured on it."""

    base: str
    """The autoencoder that training started from: preset, hub id or path."""

    base_fingerprint: str
    """Digest of its weights."""

    fingerprint: str
    """Digest of the weights beside this file."""

    data: str
    """What it was trained on."""

    num_steps: int
    """Optimizer steps."""

    recipe: dict[str, Any]
    """The complete configuration of the run."""

    latent_mean: tuple[float, ...]
    """Per channel, raw latents."""

    latent_std: tuple[float, ...]
    """Per channel, raw latents."""

    figures: dict[str, float]
    """Measured at the end of the run; `before_` marks the base."""

    eqvae_version: str

    def write(self, folder: Path) -> None:
        """Write into the model's folder."""
        write_json(folder / MODEL_CARD, self)
