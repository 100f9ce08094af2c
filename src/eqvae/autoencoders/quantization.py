"""Vector quantization (van den Oord et al. 2017, arXiv:1711.00937): nearest codes, straight-through gradient, loss."""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK_SIZE = 2**22
"""Scores held at a time by the search: 16 MiB of float32."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Raw latents after the codebook, and the two terms of Equation 3 of arXiv:1711.00937 that shape it."""

    z_q: Float[Tensor, "n c h w"]
    """The nearest codes; backward, the gradient passes straight through to the latents and not to the codebook."""

    tokens: Int64[Tensor, "n h w"]
    """Which codes they are."""

    codebook_loss: Float[Tensor, " n"]
    """`||sg[z] - e||^2`, summed over the latent of each image: pulls codes to latents."""

    commitment_loss: Float[Tensor, " n"]
    """`||z - sg[e]||^2`, summed over the latent of each image: pulls latents to codes."""


@torch.no_grad()
def nearest_codes(
    vectors: Float[Tensor, "n c"], codebook: Float[Tensor, "codes c"], *, block_size: int = BLOCK_SIZE
) -> Int64[Tensor, " n"]:
    """Find each vector's nearest code, `argmin_k ||z - e_k||^2`, which is `argmin_k ||e_k||^2 / 2 - z . e_k`.

    One matrix product for each block of vectors takes the place of the tensor of all differences (n, codes, c).
    """
    with _full_precision(vectors.device):
        codes = codebook.float()
        half_norms = 0.5 * codes.square().sum(1)
        tokens = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
        size = max(1, block_size // len(codes))
        for start in range(0, len(vectors), size):
            block = slice(start, start + size)
            scores = torch.addmm(half_norms, vectors[block].float(), codes.T, alpha=-1.0)
            tokens[block] = scores.argmin(1)
        return tokens


def quantize(z: Float[Tensor, "n c h w"], codebook: Float[Tensor, "codes c"]) -> Quantized:
    """Replace raw latents by their nearest codes."""
    with _full_precision(z.device):
        latents = z.float()
        n, c, h, w = z.shape
        tokens = nearest_codes(latents.permute(0, 2, 3, 1).reshape(-1, c), codebook).view(n, h, w)
        codes = look_up(tokens, codebook).float()
        # The difference is exactly zero, so the values are the codes' own; z + (e - z), as often written, rounds.
        z_q = codes.detach().to(z.dtype) + (z - z.detach())
        return Quantized(
            z_q=z_q,
            tokens=tokens,
            codebook_loss=(codes - latents.detach()).square().flatten(1).sum(1),
            commitment_loss=(latents - codes.detach()).square().flatten(1).sum(1),
        )


def look_up(tokens: Int64[Tensor, "n h w"], codebook: Float[Tensor, "codes c"]) -> Float[Tensor, "n c h w"]:
    """Take codes out of the codebook."""
    return F.embedding(tokens, codebook).permute(0, 3, 1, 2)


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Leave autocast, which PyTorch's meta device does not know."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
