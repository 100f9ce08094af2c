"""What the adapters over diffusers' models share: one wrapped model, its config, and how both are written."""

import json
from pathlib import Path
from typing import Any, ClassVar

from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor

from eqvae.artifacts import CONFIG, write_json, write_tensors
from eqvae.autoencoders.protocol import Autoencoder

WEIGHTS = "diffusion_pytorch_model"
"""The stem of the weight files in a diffusers folder."""


class DiffusersAutoencoder(Autoencoder):
    """An autoencoder that wraps one diffusers model.

    Attributes:
        model: The wrapped model; its parameters are this module's parameters under `model.`.
        model_classes: The diffusers classes that the adapter takes.
    """

    model_classes: ClassVar[tuple[type[ModelMixin], ...]]

    def __init__(self, model: Any, *, name: str, stride: int) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model
        self.name = name
        self.stride = stride
        self.latent_channels = model.config.latent_channels

    def decode(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        """Decode raw latents."""
        return self.model.decode(z).sample

    def save(self, folder: Path) -> None:
        """Write `config.json` and the weights as safetensors, each atomically."""
        write_json(folder / CONFIG, json.loads(self.model.to_json_string()))
        write_tensors(folder / f"{WEIGHTS}.safetensors", self.model.state_dict(), {"format": "pt"})
