"""Autoencoders with a Gaussian posterior: SD, SDXL, SD3 and Flux (`AutoencoderKL`), FLUX.2 (`AutoencoderKLFlux2`)."""

import math
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.autoencoders.adapter import DiffusersAutoencoder
from eqvae.autoencoders.protocol import LatentStatistics, Posterior


class KLAutoencoder(DiffusersAutoencoder):
    """Adapter over `AutoencoderKL` and `AutoencoderKLFlux2`."""

    model_classes = (AutoencoderKL, AutoencoderKLFlux2)

    def __init__(self, model: Any, *, name: str) -> None:
        """Wrap a model; its stride follows from the number of its resolutions."""
        super().__init__(model, name=name, stride=2 ** (len(model.config.block_out_channels) - 1))

    def encode(self, x: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Encode images; the log variance is clamped to [-30, 20] by diffusers."""
        posterior = self.model.encode(x).latent_dist
        return Posterior(mean=posterior.mean, log_variance=posterior.logvar)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution."""
        return self.model.decoder.conv_out

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write measured statistics where diffusers' pipelines read them.

        Three conventions exist. FLUX.2 normalizes 2x2-patchified latents by its batch norm's buffers. A config with
        `latents_mean` and `latents_std` normalizes channels by them *and* multiplies by `scaling_factor`, so that the
        latter must become 1. All others know the scalars only: `(z - shift_factor) * scaling_factor`. There,
        `latents_mean` must stay empty: filled in, SDXL's pipeline would divide by the standard deviation twice.
        """
        config = self.model.config
        if isinstance(self.model, AutoencoderKLFlux2):
            _write_batch_norm(self.model, statistics)
        elif config.latents_mean is not None and config.latents_std is not None:
            self.model.register_to_config(
                latents_mean=list(statistics.mean), latents_std=list(statistics.std), scaling_factor=1.0
            )
        else:
            mean, std = statistics.overall()
            self.model.register_to_config(scaling_factor=1.0 / std, shift_factor=mean)


def _write_batch_norm(model: Any, statistics: LatentStatistics) -> None:
    """Write channel statistics into the buffers of FLUX.2's batch norm, whose channels are (latent channel, cell)."""
    cells = math.prod(model.config.patch_size)
    buffer = model.bn.running_mean
    mean = torch.tensor(statistics.mean, dtype=buffer.dtype, device=buffer.device)
    std = torch.tensor(statistics.std, dtype=buffer.dtype, device=buffer.device)
    model.bn.running_mean.copy_(mean.repeat_interleave(cells))
    # The pipelines divide by sqrt(running_var + eps).
    model.bn.running_var.copy_((std.square() - model.bn.eps).clamp_min(0.0).repeat_interleave(cells))
