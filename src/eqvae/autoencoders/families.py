"""Families of autoencoders over diffusers' models: KL (SD, SDXL, SD3, Flux, FLUX.2), TAESD, DC-AE, VQ-GAN."""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.artifacts.files import check_finite, write_json, write_tensors
from eqvae.artifacts.names import AUTOENCODER_WEIGHTS, CONFIG
from eqvae.autoencoders.padding import set_padding_mode
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, LatentStatistics, Posterior
from eqvae.autoencoders.tiny import PooledAutoencoderTiny
from eqvae.errors import UserError, nearest_name

_PADDING = "padding_mode"
"""Ours in a `config.json`: diffusers warns that it does not know it, and pads with zeros."""


class DiffusersAutoencoder(Autoencoder):
    """An autoencoder that wraps one diffusers model, whose parameters are its own under `model.`.

    Attributes:
        model: The wrapped model.
        model_classes: The diffusers classes that the family takes.
        levels_field: A field of their config with one entry for each resolution.
        has_shift: Whether their config knows a `shift_factor` beside the `scaling_factor`.
        names_in_file: The weights' names where they were loaded from, without what stood before all of them.
    """

    model_classes: ClassVar[tuple[type[ModelMixin], ...]]
    levels_field: ClassVar[str] = "block_out_channels"
    has_shift: ClassVar[bool] = True
    names_in_file: tuple[str, ...] = ()

    def __init__(self, model: Any, *, name: str) -> None:
        """Wrap a model; its stride follows from the number of its resolutions."""
        super().__init__()
        self.model, self.name = model, name
        self.stride = 2 ** (len(model.config[self.levels_field]) - 1)
        self.latent_channels = model.config.latent_channels
        self.image_channels = model.config.in_channels

    @classmethod
    def build(cls, class_name: str, config: Mapping[str, Any], *, name: str) -> "DiffusersAutoencoder":
        """Build what a `config.json` describes, with the weights that its layers begin with."""
        model_class: Any = next(each for each in cls.model_classes if each.__name__ == class_name)
        _check_types(model_class, config)
        _check_factors(config)
        model = model_class.from_config({key: value for key, value in config.items() if key != _PADDING})
        if _PADDING in config:
            set_padding_mode(model, config[_PADDING])
        return cls(model, name=name)

    def check_shapes(self) -> None:
        """See that a model codes images as its config says; on the meta device nothing is computed."""
        x = torch.empty(1, self.image_channels, 2 * self.stride, 2 * self.stride)
        z = self.encode(x).mean
        if z.shape != (1, self.latent_channels, 2, 2):
            raise ValueError(f"it encodes {tuple(x.shape)} into {tuple(z.shape)}")
        if self.decode(z).shape != x.shape:
            raise ValueError(f"it decodes {tuple(z.shape)} into {tuple(self.decode(z).shape)}")

    def encode(self, x: Float[Tensor, "n k h w"]) -> Posterior:
        """Encode images; deterministic, as all families are but those of a Gaussian posterior."""
        return Posterior(mean=self.model.encode(x).latents)

    def decode(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h2 w2"]:
        """Decode raw latents."""
        return self.model.decode(z).sample

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution."""
        return self.model.decoder.conv_out

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write `scaling_factor` and `shift_factor`; without a shift, the reciprocal of the root mean square."""
        mean, std = statistics.overall()
        if not std > 0.0:
            raise UserError(f"The latents of '{self.name}' do not vary", "Take other weights, or other images")
        if self.has_shift:
            self.model.register_to_config(scaling_factor=1.0 / std, shift_factor=mean)
        else:
            self.model.register_to_config(scaling_factor=1.0 / math.hypot(mean, std))

    def save(self, folder: Path) -> None:
        """Write `config.json` and the weights as safetensors, each atomically."""
        write_json(folder / CONFIG, json.loads(self.model.to_json_string()))
        mend = "Take an earlier checkpoint, or a lower --learning-rate"
        check_finite(self.model.state_dict(), source=self.name, mend=mend)
        write_tensors(folder / AUTOENCODER_WEIGHTS, self.model.state_dict(), {"format": "pt"})


class KLAutoencoder(DiffusersAutoencoder):
    """Autoencoders with a Gaussian posterior: SD, SDXL, SD3, Flux."""

    model_classes = (AutoencoderKL,)

    def encode(self, x: Float[Tensor, "n k h w"]) -> Posterior:
        """Encode images; the log variance is clamped to [-30, 20] by diffusers."""
        posterior = self.model.encode(x).latent_dist
        return Posterior(mean=posterior.mean, log_variance=posterior.logvar)

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write measured statistics where diffusers' pipelines read them.

        A config with `latents_mean` and `latents_std` normalizes channels by them *and* multiplies by
        `scaling_factor`, so that the latter must become 1. All others know the scalars only:
        `(z - shift_factor) * scaling_factor`. There, `latents_mean` must stay empty: filled in, SDXL's pipeline would
        divide by the standard deviation twice.
        """
        config = self.model.config
        if config.latents_mean is not None and config.latents_std is not None:
            std = [each or 1.0 for each in statistics.std]  # a channel that never varies has nothing to scale
            self.model.register_to_config(latents_mean=list(statistics.mean), latents_std=std, scaling_factor=1.0)
        else:
            super().set_latent_statistics(statistics)


class Flux2Autoencoder(KLAutoencoder):
    """FLUX.2's, whose pipelines normalize 2x2-patchified latents by a batch norm."""

    model_classes = (AutoencoderKLFlux2,)

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write channel statistics into the batch norm's buffers, whose channels are (latent channel, cell)."""
        norm, cells = self.model.bn, math.prod(self.model.config.patch_size)
        mean, std = (
            torch.tensor(values, dtype=norm.running_mean.dtype, device=norm.running_mean.device)
            for values in (statistics.mean, statistics.std)
        )
        norm.running_mean.copy_(mean.repeat_interleave(cells))
        # The pipelines divide by sqrt(running_var + eps).
        norm.running_var.copy_((std.square() - norm.eps).clamp_min(0.0).repeat_interleave(cells))


class TinyAutoencoder(DiffusersAutoencoder):
    """Tiny distilled autoencoders: TAESD and its relatives for SDXL, SD3, Flux and FLUX.2; deterministic."""

    model_classes = (AutoencoderTiny, PooledAutoencoderTiny)
    levels_field = "num_encoder_blocks"

    @classmethod
    def build(cls, class_name: str, config: Mapping[str, Any], *, name: str) -> "DiffusersAutoencoder":
        """Leave out an entry that AutoencoderTiny writes into its config and, reading it, says it does not know."""
        known = {key: value for key, value in config.items() if key != "block_out_channels"}
        return super().build(class_name, known, name=name)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution."""
        return self.model.decoder.layers[-1]


class DCAutoencoder(DiffusersAutoencoder):
    """Deep-compression autoencoders (arXiv:2410.10733): strides 32 to 128, deterministic, no shift in their config."""

    model_classes = (AutoencoderDC,)
    levels_field = "encoder_block_out_channels"
    has_shift = False

    def encode(self, x: Float[Tensor, "n k h w"]) -> Posterior:
        """Encode images."""
        return Posterior(mean=self.model.encode(x).latent)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution; a pixel shuffle follows where the finest resolution has no blocks."""
        layer = self.model.decoder.conv_out
        return layer if isinstance(layer, nn.Conv2d) else layer.conv


class VQAutoencoder(DiscreteAutoencoder, DiffusersAutoencoder):
    """Discrete autoencoders: VQ-GAN, LDM's VQ-regularized ones, LlamaGen's tokenizer.

    Their scaling factor is for diffusion on E(x); tokens need none.
    """

    model_classes = (VQModel,)
    has_shift = False

    def __init__(self, model: Any, *, name: str) -> None:
        """Wrap a model; `latent_channels` of its config is the width between encoder and `quant_conv`."""
        super().__init__(model, name=name)
        self.latent_channels = model.quantize.embedding.embedding_dim

    @property
    def codebook(self) -> nn.Parameter:
        """The codes, (codebook_size, latent_channels)."""
        return self.model.quantize.embedding.weight

    def decode_quantized(self, z_q: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h2 w2"]:
        """Decode what lies on codes already."""
        model = self.model
        return model.decoder(model.post_quant_conv(z_q), z_q if model.config.norm_type == "spatial" else None)


def _check_types(model_class: Any, config: Mapping[str, Any]) -> None:
    """Hold a config's values to the kinds that the class's own defaults have: some wrong ones fail in the first run."""
    for name, parameter in inspect.signature(model_class.__init__).parameters.items():
        value, default = config.get(name), parameter.default
        if value is None or default is None or default is parameter.empty:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        kinds = {
            bool: isinstance(value, bool),
            int: isinstance(value, int) and is_number and 0 <= value < 2**31,
            float: is_number and math.isfinite(value),
            str: isinstance(value, str | list | tuple),
            tuple: isinstance(value, list | tuple) or (is_number and "layers_per_block" in name),
        }
        if not kinds.get(type(default), True):
            raise ValueError(f"{name} is {value!r}"[:100])


def _check_factors(config: Mapping[str, Any]) -> None:
    """Hold optional factors, which have no default, to what readers make of them."""
    channels = config.get("latent_channels", 4)
    for name, length in (("shift_factor", 1), ("latents_mean", channels), ("latents_std", channels)):
        value = config.get(name)
        each = [value] if name == "shift_factor" else value
        if value is None or (
            isinstance(each, list | tuple)
            and len(each) == length
            and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in each)
            and (name != "latents_std" or min(each) > 0)
        ):
            continue
        raise ValueError(f"{name} is {value!r}"[:100])


_FAMILIES = (KLAutoencoder, Flux2Autoencoder, TinyAutoencoder, DCAutoencoder, VQAutoencoder)


def find_family(class_name: str, source: str) -> type[DiffusersAutoencoder]:
    """Look up the family of a `_class_name`; `source` names where it stands, for the error's line."""
    families = {model.__name__: family for family in _FAMILIES for model in family.model_classes}
    if class_name not in families:
        raise UserError(f"'{source}' is of the unknown class '{class_name}'", nearest_name(class_name, families))
    return families[class_name]
