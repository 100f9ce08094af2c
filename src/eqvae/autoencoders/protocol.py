"""What every autoencoder offers, whatever its family: encode to a posterior, decode, and say what its latents are.

A discrete one has a codebook between the two, and offers tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from eqvae.artifacts.files import fingerprint
from eqvae.autoencoders.padding import padding_identity
from eqvae.autoencoders.quantization import Quantized, look_up, quantize
from eqvae.errors import UserError

__all__ = ["Autoencoder", "DiscreteAutoencoder", "LatentStatistics", "Posterior", "Quantized"]


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """The encoder's answer: a diagonal Gaussian over raw latents, or a point where the encoder is deterministic."""

    mean: Float[Tensor, "n c h w"]
    """Raw latents."""

    log_variance: Float[Tensor, "n c h w"] | None = None
    """Logarithm of the variance, nats; None for a deterministic encoder."""

    def mode(self) -> Float[Tensor, "n c h w"]:
        """The most probable raw latent: the mean."""
        return self.mean

    def sample(self, noise: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Draw a raw latent by the reparametrization `mean + std * noise`.

        Args:
            noise: Standard normal numbers; the caller owns the randomness.

        Returns:
            The sample; the mean itself where the encoder is deterministic.
        """
        if self.log_variance is None:
            return self.mean
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Tensor, " n"]:
        """Kullback-Leibler divergence to N(0, I), summed over the latent (L_reg in Equation 1 of arXiv:2502.09509).

        Returns:
            Nats for each image; zero where the encoder is deterministic.
        """
        if self.log_variance is None:
            return self.mean.new_zeros(self.mean.shape[0])
        mean, log_variance = self.mean.float(), self.log_variance.float()
        terms = mean.square() + log_variance.exp() - 1.0 - log_variance
        return 0.5 * terms.flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Per-channel mean and standard deviation of raw latents: `normalized = (z - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def overall(self) -> tuple[float, float]:
        """Pool the channels, which have equally many values.

        Returns:
            Mean and standard deviation of all values: the scalar shift and the reciprocal of the scalar scaling factor
            of LDM's and diffusers' configs.
        """
        count = len(self.mean)
        mean = math.fsum(self.mean) / count
        second_moment = math.fsum(m**2 + s**2 for m, s in zip(self.mean, self.std, strict=True)) / count
        return mean, math.sqrt(max(second_moment - mean**2, 0.0))


class Autoencoder(nn.Module, ABC):
    """An image autoencoder. Images are (n, image_channels, h, w) in [-1, 1] at every adapter; latents are raw.

    Attributes:
        name: The preset, hub id or path that it was loaded from.
        stride: Pixels per latent cell.
        latent_channels: Channels of the latent.
        image_channels: Channels of an image: 3 for RGB, 1 for grey, others as the data have them.
    """

    name: str
    stride: int
    latent_channels: int
    image_channels: int = 3

    @abstractmethod
    def encode(self, x: Float[Tensor, "n k h w"]) -> Posterior:
        """Encode images.

        Args:
            x: Images in [-1, 1]; both sides divisible by `stride`.

        Returns:
            The posterior over raw latents of (n, latent_channels, h / stride, w / stride).
        """

    @abstractmethod
    def decode(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h2 w2"]:
        """Decode raw latents.

        Args:
            z: Raw latents.

        Returns:
            Images, nominally in [-1, 1] but not clamped.
        """

    @property
    @abstractmethod
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution, where the adaptive weight of the adversarial loss is measured."""

    @property
    def last_encoder_layer(self) -> nn.Conv2d:
        """The encoder's last convolution, where adaptive weights of terms on latents are measured.

        Raises:
            AttributeError: If there is no encoder with convolutions.
        """
        found = [
            module
            for name, module in self.named_modules()
            if "encoder" in name.split(".") and isinstance(module, nn.Conv2d)
        ]
        if not found:
            raise AttributeError(f"'{self.name}' has no encoder with convolutions")
        return found[-1]

    @abstractmethod
    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write measured statistics into the model's own config, in its family's terms (scaling and shift factors).

        Args:
            statistics: Per-channel mean and standard deviation of raw latents.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that `diffusers` loads with `from_pretrained`: weights as safetensors and `config.json`.

        Args:
            folder: An existing folder.
        """

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that latents depend on: those under `encoder` and `quant_conv`, in every family's names.

        A class whose encoder has another name overrides this, which all the rest follows.

        Yields:
            Parameters.
        """
        for name, parameter in self.named_parameters():
            if _is_encoders(name):
                yield parameter

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that only pictures depend on: neither the encoder's nor the codes.

        Yields:
            Parameters.
        """
        own = self._of_latents()
        yield from (parameter for parameter in self.parameters() if id(parameter) not in own)

    def _of_latents(self) -> set[int]:
        """Which parameters latents and tokens depend on, by identity: the encoder's, and the codes."""
        codes = [self.codebook] if isinstance(self, DiscreteAutoencoder) else []
        return {id(parameter) for parameter in (*self.encoder_parameters(), *codes)}

    def num_parameters(self) -> int:
        """Count the parameters of encoder and decoder."""
        return sum(parameter.numel() for parameter in self.parameters())

    def fingerprint(self) -> str:
        """Digest of all weights: 16 hexadecimal digits that change when any weight, or the padding, changes."""
        return fingerprint([*sorted(self.state_dict().items()), *padding_identity(self)])

    def encoder_fingerprint(self) -> str:
        """Digest of the weights that latents and tokens depend on; training the decoder alone does not change it."""
        if next(self.encoder_parameters(), None) is None:  # none, or under names that nobody told us
            return self.fingerprint()
        kept = self._of_latents()
        own = {name for name, parameter in self.named_parameters() if id(parameter) in kept}
        named = sorted((k, v) for k, v in self.state_dict().items() if k in own or _is_encoders(k))
        return fingerprint([*named, *padding_identity(self)])

    def check_decodes(self, latents: str, *, made_by: str, fingerprint: str, encoder_fingerprint: str | None) -> str:
        """Refuse latents of another encoder.

        Args:
            latents: Whose they are, as a message begins: "The latents in 'latents/sd' were made by".
            made_by: Name of the autoencoder that made them.
            fingerprint: Digest of all its weights.
            encoder_fingerprint: Digest of its encoder's; None where an older eqvae wrote none.

        Returns:
            Digest of all weights: another than `fingerprint` where only the decoder was trained further.

        Raises:
            UserError: If the encoders differ, or their sameness can't be told.
        """
        own = self.fingerprint()
        if own == fingerprint or encoder_fingerprint == self.encoder_fingerprint():
            return own
        unknown = " in encoder or decoder (which of them was not recorded then)" if encoder_fingerprint is None else ""
        raise UserError(
            f"{latents} '{made_by}' ({fingerprint}), and '{self.name}' has other weights ({own}){unknown}",
            f"Give '{made_by}', or one whose decoder alone was trained further, as --autoencoder",
        )


def _is_encoders(name: str) -> bool:
    """Whether latents depend on a tensor of this name."""
    return not {"encoder", "quant_conv"}.isdisjoint(name.split("."))


class DiscreteAutoencoder(Autoencoder):
    """An autoencoder with a codebook. Its raw latents are E(x) *before* quantization, and tau acts on these.

    `decode` quantizes first, so that `decode(tau(z))` is D(tau o E(x)) as arXiv:2502.09509 means it.

    Attributes:
        latent_channels: Channels of E(x) and of a code.
    """

    @property
    @abstractmethod
    def codebook(self) -> nn.Parameter:
        """The codes, (codebook_size, latent_channels)."""

    @abstractmethod
    def decode_quantized(self, z_q: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h2 w2"]:
        """Decode what lies on codes already.

        Args:
            z_q: `Quantized.z_q`.

        Returns:
            Images, nominally in [-1, 1] but not clamped.
        """

    @property
    def codebook_size(self) -> int:
        """Count the codes."""
        return len(self.codebook)

    def quantize(self, z: Float[Tensor, "n c h w"]) -> Quantized:
        """Replace raw latents by their nearest codes.

        Args:
            z: E(x) or tau o E(x).

        Returns:
            Codes, through which gradients pass straight, tokens, and the losses of the codebook.
        """
        return quantize(z, self.codebook)

    def decode(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h2 w2"]:
        """Quantize and decode raw latents.

        Args:
            z: E(x) or tau o E(x).

        Returns:
            Images, nominally in [-1, 1] but not clamped.
        """
        return self.decode_quantized(self.quantize(z).z_q)

    def decode_tokens(self, tokens: Int64[Tensor, "n h w"]) -> Float[Tensor, "n k h2 w2"]:
        """Decode tokens.

        Args:
            tokens: 0 ... codebook_size - 1.

        Returns:
            Images, nominally in [-1, 1] but not clamped.
        """
        return self.decode_quantized(look_up(tokens, self.codebook))


def uncompiled(autoencoder: Autoencoder) -> Any:
    """Look behind torch.compile."""
    return getattr(autoencoder, "_orig_mod", autoencoder)


def check_images(autoencoder: Autoencoder, x: Float[Tensor, "n k h w"]) -> None:
    """Refuse images without whole latent cells, and an autoencoder wrapped in what is none."""
    if not isinstance(uncompiled(autoencoder), Autoencoder):
        raise UserError(
            f"{type(autoencoder).__name__} is no eqvae.Autoencoder",
            "Wrap a module whose forward computes the loss, and call that",
        )
    (height, width), stride = x.shape[-2:], autoencoder.stride
    if height % stride or width % stride or not min(height, width):
        fitting = " x ".join(str(max(round(side / stride), 1) * stride) for side in (height, width))
        raise UserError(f"images of {height} x {width} px have no whole cells of {stride} px", f"Use {fitting}")
