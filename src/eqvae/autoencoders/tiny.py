"""Tiny distilled autoencoders (TAESD and its relatives for SDXL, SD3, Flux and FLUX.2) and their `.pth` pairs."""

from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.autoencoders.adapter import DiffusersAutoencoder
from eqvae.autoencoders.protocol import LatentStatistics, Posterior
from eqvae.errors import UserError

ENCODER_SUFFIXES = ("_encoder.pth", "_encoder.safetensors")


class PooledBlock(nn.Module):
    """A residual block with a second, pointwise branch whose group norm pools over the whole image.

    Attributes:
        pool: 1x1 convolution to four times the channels, normalization in four groups, ReLU, 1x1 convolution back.
        conv: Three 3x3 convolutions with ReLUs between.
    """

    def __init__(self, num_channels: int) -> None:
        """Build both branches."""
        super().__init__()
        wide = 4 * num_channels
        self.pool = nn.Sequential(
            nn.Conv2d(num_channels, wide, 1, bias=False),
            nn.GroupNorm(4, wide),
            nn.ReLU(),
            nn.Conv2d(wide, num_channels, 1, bias=False),
        )
        self.conv = nn.Sequential(
            nn.Conv2d(num_channels, num_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(num_channels, num_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(num_channels, num_channels, 3, padding=1),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Add the pooled branch, then the convolutional one."""
        x = x + self.pool(x)
        return (self.conv(x) + x).relu()


class PooledAutoencoderTiny(AutoencoderTiny):
    """FLUX.2's variant: an `AutoencoderTiny` whose blocks next to the latent have the pooled branch.

    Its folders carry this class's name; `PooledAutoencoderTiny.from_pretrained` loads them.
    """

    # diffusers reads the config's fields off this signature.
    @wraps(AutoencoderTiny.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.config
        encoder, decoder = self.encoder.layers, self.decoder.layers
        last = len(encoder) - 1  # the convolution to the latent
        for index in range(last - config.num_encoder_blocks[-1], last):
            encoder[index] = PooledBlock(config.encoder_block_out_channels[-1])
        first = 2  # after the convolution from the latent and its ReLU
        for index in range(first, first + config.num_decoder_blocks[0]):
            decoder[index] = PooledBlock(config.decoder_block_out_channels[0])


class TinyAutoencoder(DiffusersAutoencoder):
    """Adapter over `AutoencoderTiny` and its pooled variant."""

    model_classes = (AutoencoderTiny, PooledAutoencoderTiny)

    def __init__(self, model: Any, *, name: str) -> None:
        """Wrap a model; its stride follows from the number of its resolutions."""
        super().__init__(model, name=name, stride=2 ** (len(model.config.num_encoder_blocks) - 1))

    def encode(self, x: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Encode images."""
        return Posterior(mean=self.model.encode(x).latents)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution."""
        return self.model.decoder.layers[-1]

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        """Write `scaling_factor` and `shift_factor`."""
        mean, std = statistics.overall()
        self.model.register_to_config(scaling_factor=1.0 / std, shift_factor=mean)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two files of a TAESD model in its author's format."""

    encoder: Path
    decoder: Path


def find_pair(path: Path) -> Pair | None:
    """Look for `X_encoder.pth` with `X_decoder.pth` (or `.safetensors`)."""
    if path.is_dir():
        encoders = sorted(file for file in path.iterdir() if file.name.endswith(ENCODER_SUFFIXES))
    else:
        encoders = [path] if path.name.endswith(ENCODER_SUFFIXES) else []
    if not encoders:
        return None
    if len(encoders) > 1:
        names = ", ".join(file.name for file in encoders)
        raise UserError(f"'{path}' holds several tiny autoencoders ({names})", "Give the path of one encoder file")
    encoder = encoders[0]
    decoder = encoder.with_name(encoder.name.replace("_encoder.", "_decoder."))
    if not decoder.is_file():
        raise UserError(f"'{decoder}' does not exist", f"It belongs to '{encoder.name}': fetch both files")
    return Pair(encoder=encoder, decoder=decoder)


@dataclass(frozen=True, kw_only=True)
class PairContent:
    """A TAESD pair in diffusers' terms."""

    class_name: str
    config: dict[str, Any]
    state: dict[str, Tensor]


def pair_to_diffusers(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> PairContent:
    """Rename the weights of a pair and read its variant and its latent channels off their shapes.

    Both files number the layers of one `nn.Sequential`. The decoder's layer 0 is the clamp `3 tanh(x / 3)`, which
    diffusers applies as a function, so that its numbers are lower by one.
    """
    state = {f"encoder.layers.{key}": tensor for key, tensor in encoder.items()}
    for key, tensor in decoder.items():
        number, _, rest = key.partition(".")
        shifted = f"{int(number) - 1}.{rest}" if number.isdecimal() else key
        state[f"decoder.layers.{shifted}"] = tensor
    pooled = any(".pool." in key for key in state)
    first = decoder.get("1.weight")
    config = {"latent_channels": first.shape[1]} if first is not None and first.ndim == 4 else {}
    return PairContent(
        class_name="PooledAutoencoderTiny" if pooled else "AutoencoderTiny", config=dict(config), state=state
    )
