"""Layers of GAT's networks, under the parameters' names of the authors' code (arXiv:2509.24935)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from eqvae.generators.transformer import attend

_LAYER_SCALE = 0.1
_SLOW = 0.01  # how much slower than others the layers that mix styles, or embed classes for the discriminator, learn


class ClassTable(nn.Module):
    """Labels to vectors; every row is a class."""

    latent_embedder: nn.Module

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes, size)

    def forward(self, labels: Int64[Tensor, " n"]) -> Float[Tensor, "n size"]:
        return self.embedding_table(labels)


class SlowLinear(nn.Module):
    """A linear layer whose weights are kept a hundred times as large as they act, so that Adam moves them less."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        return F.linear(x, self.weight * _SLOW, self.bias * _SLOW)


def slow_layers(num_inputs: int, width: int) -> nn.Sequential:
    """Two slow layers."""
    return nn.Sequential(SlowLinear(num_inputs, width), nn.SiLU(), SlowLinear(width, width))


class Norm(nn.RMSNorm):
    """PyTorch's, which says under autocast that weight and tokens differ in type, and is slow then."""

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        return F.rms_norm(x, self.normalized_shape, None, self.eps) * self.weight


class RotaryAttention(nn.Module):
    """Self-attention with normalized queries and keys, rotated by their places; tokens before the grid have none."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = Norm(width // num_heads)
        self.k_norm = Norm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "n tokens width"], rotation: Float[Tensor, "2 cells head"]
    ) -> Float[Tensor, "n tokens width"]:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(self.q_norm(query), rotation), rotate(self.k_norm(key), rotation)
        attended = attend(query.to(value.dtype), key.to(value.dtype), value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """SwiGLU on each token, two thirds of four times as wide (arXiv:2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class ModulatedBlock(nn.Module):
    """The generator's: the style scales attention's and feed-forward's input and gates their output."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = RotaryAttention(width, num_heads)
        self.mlp = GatedFeedForward(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))

    def forward(
        self,
        tokens: Float[Tensor, "n tokens width"],
        style: Float[Tensor, "n width"],
        rotation: Float[Tensor, "2 cells head"],
    ) -> Float[Tensor, "n tokens width"]:
        scale, gate, mlp_scale, mlp_gate = self.adaLN_modulation(style)[:, None].chunk(4, dim=-1)
        tokens = tokens + gate * self.attn(_normalize(tokens) * (1 + scale), rotation)
        return tokens + mlp_gate * self.mlp(_normalize(tokens) * (1 + mlp_scale))


class ModulatedOutput(nn.Module):
    """Tokens to patches of a level's output."""

    def __init__(self, width: int, num_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, width))

    def forward(
        self, tokens: Float[Tensor, "n tokens width"], style: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n tokens values"]:
        return self.linear(_normalize(tokens) * (1 + self.adaLN_modulation(style)[:, None]))


class ScaledBlock(nn.Module):
    """The discriminator's: learned scales of each channel gate the outputs (LayerScale, arXiv:2103.17239)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = Norm(width, eps=1e-6)
        self.attn = RotaryAttention(width, num_heads)
        self.norm2 = Norm(width, eps=1e-6)
        self.mlp = GatedFeedForward(width)
        self.ls_attn = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.ls_mlp = nn.Parameter(torch.full((width,), _LAYER_SCALE))

    def forward(
        self, tokens: Float[Tensor, "n tokens width"], rotation: Float[Tensor, "2 cells head"]
    ) -> Float[Tensor, "n tokens width"]:
        tokens = tokens + self.attn(self.norm1(tokens), rotation) * self.ls_attn
        return tokens + self.mlp(self.norm2(tokens)) * self.ls_mlp


def rotation_of(rows: int, columns: int, head_size: int, device: torch.device) -> Float[Tensor, "2 cells head"]:
    """Cosines and sines of rotary positions, arXiv:2104.09864: rows turn the first half of a head, columns the other.

    Neighbouring channels are a pair, turned together.
    """
    half = head_size // 2
    frequencies = 10_000.0 ** -(torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angles = torch.cat([place.reshape(-1, 1) * frequencies for place in (row, column)], dim=1).repeat_interleave(2, 1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(
    x: Float[Tensor, "n heads tokens head"], rotation: Float[Tensor, "2 cells head"]
) -> Float[Tensor, "n heads tokens head"]:
    """Turn the pairs of channels of the last tokens, which are the grid's."""
    num_before = x.shape[2] - rotation.shape[1]
    before, cells = x[:, :, :num_before], x[:, :, num_before:]
    first, second = cells.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    cosine, sine = rotation.unbind(0)
    return torch.cat([before.to(cosine.dtype), cells * cosine + turned * sine], dim=2)


def _normalize(tokens: Tensor) -> Tensor:
    return F.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)


def at_least_fp32(x: Tensor) -> Tensor:
    """Go on in float32 where the layers autocast: sums of levels and differences of logits need its digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
    """Scale a vector to a mean square of 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


@torch.no_grad()
def initialize(network: nn.Module, generator: torch.Generator | None) -> None:
    """Draw first weights: Xavier's, a tenth of them where styles modulate."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | SlowLinear):
            gain = 1 / _SLOW if isinstance(module, SlowLinear) else 0.1 if "adaLN_modulation" in name else 1.0
            nn.init.xavier_uniform_(module.weight.flatten(1), gain=gain, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
