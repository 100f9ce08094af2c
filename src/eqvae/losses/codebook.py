"""How codes are kept alive and, where asked for, averaged instead of trained by gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from eqvae.autoencoders.protocol import Quantized
from eqvae.runtime.processes import Processes

_SMOOTHING = 1e-5
"""epsilon of Laplace smoothing: no code divides by zero."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the codes of a discrete autoencoder learn."""

    codebook: Literal["gradient", "ema"] = "gradient"
    """How a discrete autoencoder's codes learn: by `codebook_weight`'s gradient, as in VQ-GAN, or as averages of the
    latents that they stand for."""

    codebook_weight: float = 1.0
    """Weight of `|sg[z] - e|^2` per value, which pulls codes to latents; taming-transformers trained with 0.25."""

    commitment_weight: float = 0.25
    """Weight of `|z - sg[e]|^2` per value, which pulls latents to codes: beta of arXiv:1711.00937, Equation 3;
    taming-transformers trained with 1, its beta being on the other term."""

    codebook_decay: float = 0.99
    """Of the averages of `ema`."""

    restart_dead_codes: int = 0
    """Steps without use after which a code starts again at a latent of the batch; 0: never."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """What a step gave to the codebook, position by position."""

    vectors: Float[Tensor, "n c"]
    """tau o E(x), in float32."""

    tokens: Int64[Tensor, " n"]
    """Their nearest codes."""

    @classmethod
    def of(cls, latents: Float[Tensor, "n c h w"], quantized: Quantized, processes: Processes) -> "Codes":
        """Take them out of a micro-batch, all processes' parts of it: each then moves the codes alike."""
        vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2).float()
        return cls(vectors=processes.join(vectors), tokens=processes.join(quantized.tokens.flatten()))

    @classmethod
    def join(cls, parts: "Sequence[Codes]") -> "Codes | None":
        """Put a step's micro-batches together."""
        if not parts:
            return None
        return cls(
            vectors=torch.cat([part.vectors for part in parts]), tokens=torch.cat([part.tokens for part in parts])
        )


@dataclass(kw_only=True)
class CodebookState:
    """What is remembered of each code, besides the code itself."""

    counts: Float[Tensor, " codes"]
    """N: moving average of how many latents of a step it stood for."""

    sums: Float[Tensor, "codes c"]
    """m: moving average of their sum."""

    steps_unused: Int64[Tensor, " codes"]
    """Steps since it last stood for one."""

    @classmethod
    def begin(cls, codebook: Float[Tensor, "codes c"]) -> "CodebookState":
        """Count each code as one latent that lies where the code is."""
        return cls(
            counts=codebook.new_ones(len(codebook)),
            sums=codebook.detach().clone(),
            steps_unused=torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a resume needs."""
        return dict(vars(self))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for name, tensor in vars(self).items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def average(self, codebook: Float[Tensor, "codes c"], codes: Codes, *, decay: float) -> None:
        """Move each code to the moving average of its latents (Appendix A.1 of arXiv:1711.00937).

        `N <- decay N + (1 - decay) n`, `m <- decay m + (1 - decay) sum z`, `e = m / N`, with Laplace smoothing of N:
        `(N + eps) / (sum N + codes eps) sum N`.
        """
        num_codes = len(codebook)
        counts = torch.bincount(codes.tokens, minlength=num_codes).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes.tokens, codes.vectors)
        self.counts.lerp_(counts, 1.0 - decay)
        self.sums.lerp_(sums, 1.0 - decay)
        total = self.counts.sum()
        smoothed = (self.counts + _SMOOTHING) / (total + num_codes * _SMOOTHING) * total
        codebook.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def restart(
        self, codebook: Float[Tensor, "codes c"], codes: Codes, *, after: int, generator: torch.Generator
    ) -> Bool[Tensor, " codes"]:
        """Let codes that nothing has come near for long start again at latents of the step."""
        self.steps_unused += 1
        self.steps_unused[codes.tokens] = 0
        longest_first = self.steps_unused.argsort(descending=True, stable=True)
        dead = longest_first[self.steps_unused[longest_first] >= after][: len(codes.vectors)]
        chosen = torch.randperm(len(codes.vectors), generator=generator)[: len(dead)]
        fresh = codes.vectors[chosen.to(codebook.device)]
        codebook[dead], self.sums[dead], self.counts[dead], self.steps_unused[dead] = fresh, fresh, 1.0, 0
        restarted = torch.zeros(len(codebook), dtype=torch.bool, device=codebook.device)
        restarted[dead] = True
        return restarted
