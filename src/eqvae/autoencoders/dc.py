"""Deep-compression autoencoders (`AutoencoderDC`, arXiv:2410.10733): strides 32 to 128, deterministic encoder."""

import math
from typing import Any

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.autoencoders.adapter import DiffusersAutoencoder
from eqvae.autoencoders.protocol import LatentStatistics, Posterior


class DCAutoencoder(DiffusersAutoencoder):
    """Adapter over `AutoencoderDC`."""

    model_classes = (AutoencoderDC,)

    def __init__(self, model: Any, *, name: str) -> None:
        """Wrap a model; its stride follows from the number of its resolutions."""
        super().__init__(model, name=name, stride=2 ** (len(model.config.encoder_block_out_channels) - 1))

    def encode(self, x: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Encode images."""
        return Posterior(mean=self.model.encode(x).latent)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution; a pixel shuffle follows where the finest resolution has no blocks."""
        layer = self.model.decoder.conv_out
        return layer if isinstance(layer, nn.Conv2d) else layer.conv

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write `scaling_factor`, the reciprocal of the root mean square: the family's config has no shift."""
        self.model.register_to_config(scaling_factor=1.0 / math.hypot(*statistics.overall()))
