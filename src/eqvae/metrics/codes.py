"""How a codebook is used: share of its codes, perplexity, and whether tokens turn and scale with the image."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class CodeCounts:
    """Counts how often each code occurs, over any number of batches.

    Attributes:
        counts: One for each code, on the CPU.
    """

    def __init__(self, codebook_size: int) -> None:
        """Start."""
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def add(self, tokens: Int64[Tensor, "..."]) -> None:
        """Take in tokens."""
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts)).cpu()

    def figures(self) -> dict[str, float]:
        """`codebook_usage` and `codebook_perplexity`; see the functions of these names."""
        return {
            "codebook_usage": codebook_usage(self.counts),
            "codebook_perplexity": codebook_perplexity(self.counts),
        }


def codebook_usage(counts: Int64[Tensor, " codes"]) -> float:
    """Tell which share of the codes occurs at all."""
    return float((counts > 0).double().mean())


def codebook_perplexity(counts: Int64[Tensor, " codes"]) -> float:
    """Tell how many codes, used alike, would be as hard to guess: `exp(-sum p log p)`."""
    shares = counts.double() / counts.sum()
    return float(torch.special.entr(shares).sum().exp())


def token_agreement(tokens: Int64[Tensor, "n h w"], others: Int64[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Compare tokens position by position."""
    return (tokens == others).flatten(1).double().mean(1)
