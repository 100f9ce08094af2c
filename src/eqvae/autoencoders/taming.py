"""VQ-GAN checkpoints: taming-transformers' format, which is LDM's with a codebook, and LlamaGen's variant of it.

diffusers' `VQModel` represents both without a change. A `GumbelVQ` of taming has other layers and is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from eqvae.autoencoders import ldm

_CODEBOOK = "quantize.embedding.weight"
_LLAMAGEN_BLOCKS = re.compile(r"(encoder|decoder)\.conv_blocks\.(\d+)\.")
_LLAMAGEN_PARTS = {
    ".res.": ".block.",
    ".mid.0.": ".mid.block_1.",
    ".mid.1.": ".mid.attn_1.",
    ".mid.2.": ".mid.block_2.",
}
_LLAMAGEN_USAGE = "quantize.codebook_used"
"""A buffer of LlamaGen's training: the latest tokens, for its usage figure."""


def has_codebook(state: Mapping[str, Tensor]) -> bool:
    """Tell a VQ-GAN's weights from those of an autoencoder with a Gaussian posterior."""
    last = state.get("encoder.conv_out.weight")
    return _CODEBOOK in state and last is not None and last.shape[0] == state["decoder.conv_in.weight"].shape[1]


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the architecture off names and shapes."""
    config = ldm.infer_config(state)
    # VQModel always has both, and strict loading will name what is missing.
    for name in ("use_quant_conv", "use_post_quant_conv"):
        del config[name]
    num_codes, width = state[_CODEBOOK].shape
    return config | {"num_vq_embeddings": num_codes, "vq_embed_dim": width, "scaling_factor": 1.0}


def is_llamagen(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are weights of LlamaGen's tokenizer (arXiv:2406.06525)."""
    return _CODEBOOK in state and any(_LLAMAGEN_BLOCKS.match(key) for key in state)


def llamagen_to_taming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of LlamaGen's tokenizer, and bring its codes to unit length.

    LlamaGen compares directions: latents and codes are normalized before the search. To codes of unit length the
    direction's nearest is the latent's own nearest, so tokens and pictures stay what they were. E(x) keeps its length
    here, however, and so do equivariance errors on it, and fine-tuning lets the codes change theirs.
    """
    num_levels = 1 + max(int(found[2]) for key in state if (found := _LLAMAGEN_BLOCKS.match(key)))

    def rename(key: str) -> str:
        found = _LLAMAGEN_BLOCKS.match(key)
        if found is not None:
            coder, index = found[1], int(found[2])  # LlamaGen counts the decoder's levels from the coarsest
            level = f"down.{index}" if coder == "encoder" else f"up.{num_levels - 1 - index}"
            key = f"{coder}.{level}.{key[found.end() :]}"
        for theirs, ours in _LLAMAGEN_PARTS.items():
            key = key.replace(theirs, ours)
        return key

    renamed = {rename(key): tensor for key, tensor in state.items() if key != _LLAMAGEN_USAGE}
    return renamed | {_CODEBOOK: F.normalize(renamed[_CODEBOOK].float(), dim=1)}
