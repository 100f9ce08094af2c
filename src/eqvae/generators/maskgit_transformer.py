"""MaskGIT's network: a bidirectional transformer from a partly masked grid of tokens to logits of every token.

Chang et al., arXiv:2202.04200, in the form of Besnier & Chen, arXiv:2310.14400, whose parameters' names and layouts it
has, so that their checkpoints load strictly: one table of codes, the mask, classes and "no class"; the class is the
last token; learned positions; two layers before the blocks and one after them; the table again as output, with a bias
for each position.

Three things differ. Logits are of the codes alone: theirs have the mask as one code more, which is never right. The
dropout of 0.1 is left out, because its randomness would depend on how a batch is split; the names count its places. And
all weights start from the truncated normal distribution of MaskGIT's own code, with which first logits are almost
even: theirs start from PyTorch's N(0, 1) table.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eqvae.errors import UserError
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import attend

FIRST_DEVIATION = 0.02
"""Of the first weights, cut off at twice as much."""


@dataclass(frozen=True)
class MaskgitSize:
    """A size of MaskGIT's transformer."""

    depth: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    num_parameters: int
    """With `PUBLISHED_TOKENS`; 174.161 million for `b` in the table of Besnier & Chen."""


PUBLISHED_TOKENS = LatentSpecification(channels=1024, height=16, width=16, num_classes=1000)
"""ImageNet at 256 px through the VQ-GAN with stride 16 and 1024 codes: what `MaskgitSize.num_parameters` refers to."""

# fmt: off
MASKGIT_SIZES = {
    #                 depth  width  heads  mlp    parameters
    "ti": MaskgitSize(8,     192,   3,     768,   4_630_634),
    "s":  MaskgitSize(12,    384,   6,     1536,  23_137_514),
    "b":  MaskgitSize(24,    768,   16,    3072,  174_160_874),
    "l":  MaskgitSize(32,    1024,  16,    3072,  341_953_002),
    "h":  MaskgitSize(48,    1024,  16,    3072,  509_921_770),
}
# fmt: on
"""`b`, `l` and `h` are "base", "big" and "huge" of Besnier & Chen's code; `ti` and `s` are ours, for CPUs."""


@dataclass(frozen=True, kw_only=True)
class MaskTransformerConfig:
    """All that determines the parameters' names and shapes."""

    latents: LatentSpecification
    """The tokens, as latents with one channel for each code of the codebook."""

    depth: int
    """Blocks."""

    hidden_size: int
    """Width of a token, divisible by `num_heads`."""

    num_heads: int

    mlp_size: int
    """Width of the blocks' hidden layer."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}", "Choose another"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.latents.height, self.latents.width

    def build(self, *, generator: torch.Generator | None = None) -> "MaskTransformer":
        """Build the network with first weights."""
        return MaskTransformer(self, generator=generator)

    def example(self) -> tuple[Tensor, ...]:
        """Make arguments for one image, as for counting operations."""
        return torch.zeros(1, *self.grid, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    @property
    def codebook_size(self) -> int:
        """Codes; the next index is the mask."""
        return self.latents.channels

    @property
    def mask_token(self) -> int:
        """The token that hides another."""
        return self.codebook_size


class MaskTransformer(nn.Module):
    """Partly masked tokens and labels to logits; see `eqvae.generators.maskgit.PredictTokens`.

    With `gradient_checkpointing` blocks are computed again in the backward pass, which saves their activations.
    """

    def __init__(self, config: MaskTransformerConfig, *, generator: torch.Generator | None = None) -> None:
        """Build it with first weights."""
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        width, (rows, columns) = config.hidden_size, config.grid
        num_embeddings = config.codebook_size + 1 + config.latents.num_classes + 1
        self.tok_emb = nn.Embedding(num_embeddings, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, rows * columns + 1, width))
        # The identities stand where the published network has its dropout, so that the others keep their numbers.
        self.first_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width),
        )  # fmt: skip
        blocks = [
            nn.Sequential(
                Residual(width, Attention(width, config.num_heads)),
                Residual(width, FeedForward(width, config.mlp_size)),
            )
            for _ in range(config.depth)
        ]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.last_layer = nn.Sequential(
            nn.LayerNorm(width, eps=1e-12), nn.Identity(), nn.Linear(width, width), nn.GELU(),
            nn.LayerNorm(width, eps=1e-12),
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(rows * columns + 1, num_embeddings))
        self._initialize(generator)

    def forward(self, tokens: Int64[Tensor, "n h w"], labels: Int64[Tensor, " n"]) -> Float[Tensor, "n h w codes"]:
        config, num_tokens = self.config, self.config.latents.height * self.config.latents.width
        if config.latents.num_classes == 0:
            labels = torch.zeros_like(labels)  # "no class", the only one
        row_of_class = labels[:, None] + config.codebook_size + 1
        x = self.tok_emb(torch.cat([tokens.flatten(1), row_of_class], dim=1)) + self.pos_emb
        x = self.first_layer(x)
        for block in self.transformer["layers"].children():
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        x = self.last_layer(x[:, :num_tokens])
        logits = F.linear(x, self.tok_emb.weight[: config.codebook_size])
        return (logits + self.bias[:num_tokens, : config.codebook_size]).unflatten(1, config.grid)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "bias":
                bound = 2 * FIRST_DEVIATION
                nn.init.trunc_normal_(parameter, std=FIRST_DEVIATION, a=-bound, b=bound, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class Residual(nn.Module):
    """A layer of a block: its input, normalized and transformed, is added to its input."""

    def __init__(self, width: int, function: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), function

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        return x + self.fn(self.norm(x))


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Build the projections, under the names of `torch.nn.MultiheadAttention`."""
        super().__init__()
        self.mha = MultiheadAttention(width, num_heads)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        return self.mha(x)


class MultiheadAttention(nn.Module):
    """PyTorch's, without its transposed copies and without its other way through in evaluation mode."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out_proj(attend(query, key, value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers on each token."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden_width), nn.GELU(), nn.Identity(), nn.Linear(hidden_width, width)
        )

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        return self.net(x)
