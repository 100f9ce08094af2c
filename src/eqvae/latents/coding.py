"""What a cache keeps of an autoencoder's answer, and in which type."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError
from eqvae.latents.index import Kind
from eqvae.latents.shards import DTYPES, MIRRORED
from eqvae.runtime.device import Precision, autocast

_MAX_INT16_CODES = 2**15

MomentsDtype = Literal["float16", "bfloat16", "float32"]


@final
@dataclass(frozen=True, kw_only=True)
class Coding:
    """Moments or tokens."""

    kind: Kind

    dtype: str
    """Of what is stored, a key of `shards.DTYPES`."""

    codebook_size: int | None = None
    """Of tokens; None for moments."""


def coding_of(autoencoder: Autoencoder, dtype: MomentsDtype) -> Coding:
    """Decide what is kept. Here and in `encode_images` alone a discrete autoencoder differs from the others."""
    if isinstance(autoencoder, DiscreteAutoencoder):
        size = autoencoder.codebook_size
        return Coding(kind="tokens", dtype="int16" if size <= _MAX_INT16_CODES else "int32", codebook_size=size)
    return Coding(kind="moments", dtype=dtype)


def encode_images(autoencoder: Autoencoder, x: Float[Tensor, "n 3 h w"]) -> dict[str, Shaped[Tensor, "n ..."]]:
    """Encode images to what is kept of them."""
    posterior = autoencoder.encode(x)
    if isinstance(autoencoder, DiscreteAutoencoder):
        return {"tokens": autoencoder.quantize(posterior.mean).tokens}
    kept = {"mean": posterior.mean.float()}
    if posterior.log_variance is not None:
        kept["std"] = torch.exp(0.5 * posterior.log_variance.float())
    return kept


@torch.inference_mode()
def encode_crops(
    autoencoder: Autoencoder,
    crops: UInt8[Tensor, "n size size 3"],
    device: torch.device,
    precision: Precision,
    mirror: bool,
) -> dict[str, Shaped[Tensor, "n ..."]]:
    """Encode one batch of crops, and their mirror images."""
    count = len(crops)
    if count == 0:
        crops = crops.new_zeros(1, *crops.shape[1:])
    if device.type == "cuda":
        crops = crops.pin_memory()
    # Bytes are laid out as channels-last already, and so are the images made of them.
    x = crops.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with autocast(device, precision):
        kept = encode_images(autoencoder, x)
        if mirror:
            flipped = x.flip(-1).contiguous(memory_format=torch.channels_last)
            kept |= {name + MIRRORED: values for name, values in encode_images(autoencoder, flipped).items()}
    return {name: values[:count] for name, values in kept.items()}


def to_stored(name: str, values: Shaped[Tensor, "n ..."], coding: Coding) -> Shaped[Tensor, "n ..."]:
    """Bring values to the type in which they are stored, and refuse those that it can't hold."""
    if coding.kind == "tokens":
        size = coding.codebook_size or 0
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise UserError(f"Tokens {int(values.min())} ... {int(values.max())} are outside a codebook of {size}")
        return values.to(DTYPES[coding.dtype]).cpu()
    if not bool(values.isfinite().all()):
        raise UserError(f"The latents hold NaN or infinite values ({name})", "Try --precision fp32")
    stored = values.to(DTYPES[coding.dtype])
    if not bool(stored.isfinite().all()):
        raise UserError(
            f"The latents reach {float(values.abs().max()):.3g} ({name}), which {coding.dtype} can't hold",
            "Use --dtype bfloat16 or float32 in another --out",
        )
    return stored.cpu()
