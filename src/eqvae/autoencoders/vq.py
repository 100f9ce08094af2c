"""Discrete autoencoders over diffusers' `VQModel`: VQ-GAN, LDM's VQ-regularized ones, LlamaGen's tokenizer."""

import math
from typing import Any

from diffusers.models.autoencoders.vq_model import VQModel
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.autoencoders.adapter import DiffusersAutoencoder
from eqvae.autoencoders.protocol import DiscreteAutoencoder, LatentStatistics, Posterior


class VQAutoencoder(DiscreteAutoencoder, DiffusersAutoencoder):
    """Adapter over `VQModel`. The search and the losses are ours (`quantization.py`): diffusers' swaps the losses."""

    model_classes = (VQModel,)

    def __init__(self, model: Any, *, name: str) -> None:
        """Wrap a model; its stride follows from the number of its resolutions."""
        super().__init__(model, name=name, stride=2 ** (len(model.config.block_out_channels) - 1))
        # `latent_channels` of the config is the width between encoder and `quant_conv`.
        self.latent_channels = model.quantize.embedding.embedding_dim

    def encode(self, x: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Encode images."""
        return Posterior(mean=self.model.encode(x).latents)

    @property
    def codebook(self) -> nn.Parameter:
        """The codes, (codebook_size, latent_channels)."""
        return self.model.quantize.embedding.weight

    def decode_quantized(self, z_q: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        """Decode what lies on codes already."""
        model = self.model
        return model.decoder(model.post_quant_conv(z_q), z_q if model.config.norm_type == "spatial" else None)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution."""
        return self.model.decoder.conv_out

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write `scaling_factor`, the reciprocal of the root mean square, for diffusion on E(x); tokens need none."""
        self.model.register_to_config(scaling_factor=1.0 / math.hypot(*statistics.overall()))
