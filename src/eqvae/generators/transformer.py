"""The backbone of DiT, SiT and REPA: a transformer over latent patches with adaLN-Zero conditioning.

Peebles & Xie, arXiv:2212.09748. Parameters have the published models' names and layouts, so that their checkpoints load
strictly; SiT (arXiv:2401.08740) is the same network, REPA (arXiv:2410.06940) adds `projectors`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eqvae.errors import UserError
from eqvae.generators.protocol import LatentSpecification

NUM_FREQUENCIES = 256
MAX_PERIOD = 10_000

MAX_WRITTEN_OUT_TOKENS = 512
"""Longer sequences would hold too large a matrix of scores."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """All that determines the parameters' names and shapes."""

    latents: LatentSpecification

    depth: int
    """Blocks."""

    hidden_size: int
    """Width of a token; divisible by 4 for the positions and by `num_heads`."""

    num_heads: int

    patch_size: int
    """Cells on the side of a token's patch."""

    out_channels: int
    """What the objective asks for: c, or 2c with learned variances."""

    mlp_ratio: float | int = 4.0
    """Width of the blocks' hidden layer over `hidden_size`."""

    qk_norm: bool = False
    """LayerNorm on queries and keys of each head, as REPA's code offers."""

    null_label: bool = True
    """Whether the labels' table has a row for "no class"; published models have one."""

    teacher_channels: int | None = None
    """Width of the tokens that REPA's projector predicts; None: no projector."""

    projector_width: int = 2048
    """Of REPA's projector; 2048 in the published model."""

    def __post_init__(self) -> None:
        if self.latents.height % self.patch_size or self.latents.width % self.patch_size:
            raise UserError(
                f"latents of {self.latents.height} x {self.latents.width} cells are no whole number of patches of "
                f"{self.patch_size}",
                "Choose a smaller patch size",
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by 4 and by num_heads {self.num_heads}",
                "Choose another",
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.latents.height // self.patch_size, self.latents.width // self.patch_size

    def build(self, *, generator: torch.Generator | None = None) -> "Transformer":
        """Build the network with first weights."""
        return Transformer(self, generator=generator)

    def example(self) -> tuple[Tensor, ...]:
        """Make arguments for one image, as for counting operations."""
        return torch.empty(1, *self.latents.shape), torch.empty(1), torch.zeros(1, dtype=torch.int64)


class WithHidden(NamedTuple):
    """An output, and the tokens on the way to it."""

    output: Float[Tensor, "n c2 h w"]

    hidden: Float[Tensor, "n tokens width"]
    """After the block that was asked for."""

    projected: Float[Tensor, "n tokens teacher"] | None
    """The projector's view of them; None where there is no projector."""


class Transformer(nn.Module):
    """Noisy latents, times and labels to a prediction; see `eqvae.generators.protocol.Predict`.

    With `gradient_checkpointing` blocks are computed again in the backward pass, which saves their activations.
    """

    def __init__(self, config: TransformerConfig, *, generator: torch.Generator | None = None) -> None:
        """Build it with first weights, initialised as DiT's: each block is the identity, the output zero."""
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        width, num_classes = config.hidden_size, config.latents.num_classes
        self.x_embedder = PatchEmbedder(config.latents.channels, width, config.patch_size)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes + config.null_label, width) if num_classes else None
        # A parameter, though frozen: published checkpoints and parameter counts include it.
        self.pos_embed = nn.Parameter(position_embedding(*config.grid, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, int(config.mlp_ratio * width), qk_norm=config.qk_norm)
            for _ in range(config.depth)
        )
        if config.teacher_channels is not None:
            self.projectors = nn.ModuleList([_projector(width, config.projector_width, config.teacher_channels)])
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.out_channels)
        self._initialize(generator)

    def forward(
        self, z: Float[Tensor, "n c h w"], t: Num[Tensor, " n"], labels: Int64[Tensor, " n"], depth: int | None = None
    ) -> Float[Tensor, "n c2 h w"] | WithHidden:
        rows, columns = (side // self.config.patch_size for side in z.shape[-2:])
        tokens = self.x_embedder(z) + self._positions(rows, columns)
        condition = self.t_embedder(t)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(labels)
        hidden = None
        for number, block in enumerate(self.blocks, start=1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, condition)
            if number == depth:
                hidden = tokens
        output = self._unpatchify(self.final_layer(tokens, condition), rows, columns)
        if depth is None:
            return output
        if hidden is None:
            raise ValueError(f"there is no block {depth} among {len(self.blocks)}")
        projected = self.projectors[0](hidden) if self.config.teacher_channels is not None else None
        return WithHidden(output, hidden, projected)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _positions(self, rows: int, columns: int) -> Float[Tensor, "... tokens width"]:
        """Look up the positions of its own grid; of another one they are computed, a cell's the same in each."""
        if (rows, columns) == self.config.grid:
            return self.pos_embed
        return position_embedding(rows, columns, self.config.hidden_size).to(self.pos_embed.device)

    def _unpatchify(
        self, tokens: Float[Tensor, "n tokens values"], rows: int, columns: int
    ) -> Float[Tensor, "n c2 h w"]:
        """Lay patches of (row, column, channel) side by side."""
        side = self.config.patch_size
        patches = tokens.reshape(len(tokens), rows, columns, side, side, self.config.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * side, columns * side)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)  # the patches' is a linear layer
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)


class PatchEmbedder(nn.Module):
    """Patches of latents to tokens, row by row."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n tokens width"]:
        return self.proj(z).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Times to vectors: cosines and sines of 128 frequencies, and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Num[Tensor, " n"]) -> Float[Tensor, "n width"]:
        return self.mlp(time_frequencies(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels to vectors; the row after the last class means "no class"."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)

    def forward(self, labels: Int64[Tensor, " n"]) -> Float[Tensor, "n width"]:
        return self.embedding_table(labels)


def time_frequencies(t: Num[Tensor, " n"]) -> Float[Tensor, "n 256"]:
    """Cosines, then sines, of t times frequencies from 1 down to almost 1 / 10000, as published."""
    half = NUM_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(rows: int, columns: int, width: int) -> Float[Tensor, "tokens width"]:
    """Fixed positions: half of the channels tell the column, half the row; in each half sines, then cosines."""
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def attend(
    query: Float[Tensor, "n heads tokens width"],
    key: Float[Tensor, "n heads tokens width"],
    value: Float[Tensor, "n heads tokens width"],
) -> Float[Tensor, "n heads tokens width"]:
    """Attend: `softmax(q k' / sqrt(width)) v` (Equation 1 of arXiv:1706.03762).

    PyTorch's fused attention for CPUs takes most of its time in its backward pass. In bf16 and for short sequences two
    plain products are 2 to 4 times faster (256 and 64 tokens, AMX); scores are rounded to bf16, as all else is there.
    """
    is_short = query.shape[-2] <= MAX_WRITTEN_OUT_TOKENS
    if query.device.type == "cpu" and query.dtype is torch.bfloat16 and query.requires_grad and is_short:
        with torch.autocast("cpu", enabled=False):  # it would compute the softmax in fp32, which takes as long again
            return ((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast the norms answer in fp32, which attention would not mix with a bf16 value.
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        attended = attend(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers on each token."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, tokens: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward; time and label shift and scale each one's input and gate its output (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, hidden_width: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads, qk_norm=qk_norm)
        self.mlp = FeedForward(width, hidden_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, tokens: Float[Tensor, "n tokens width"], condition: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n tokens width"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        tokens = tokens + gate * self.attn(_modulate(tokens, shift, scale))
        return tokens + mlp_gate * self.mlp(_modulate(tokens, mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    """Tokens to patches of the output."""

    def __init__(self, width: int, num_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(
        self, tokens: Float[Tensor, "n tokens width"], condition: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n tokens values"]:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(tokens, shift, scale))


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _projector(width: int, hidden_width: int, teacher_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden_width),
        nn.SiLU(),
        nn.Linear(hidden_width, hidden_width),
        nn.SiLU(),
        nn.Linear(hidden_width, teacher_channels),
    )
