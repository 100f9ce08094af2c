"""FLUX.2's tiny autoencoder, which diffusers does not know: an `AutoencoderTiny` with pooled blocks."""

from functools import wraps
from typing import Any

from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor, nn


class PooledBlock(nn.Module):
    """A residual block with a second, pointwise branch whose group norm pools over the whole image."""

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
