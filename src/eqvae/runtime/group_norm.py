"""GroupNorm with a backward pass of our own, where PyTorch's is slow: channels-last on a processor, narrow groups.

PyTorch's kernel for channels-last works along the channels of a group. With fewer than a vector register holds, as in
the first layers of every autoencoder of Stable Diffusion's kind, it takes ten times what the arithmetic needs.
"""

from typing import Any

import torch
from torch import Tensor, nn

_WIDE = {torch.float32: 8, torch.bfloat16: 16}
"""Channels of a group from which on PyTorch's kernel is as fast."""

_BLOCK = 2**18
"""Values that are worked on at a time: in float32 they fit a core's cache."""


class GroupNorm(nn.GroupNorm):
    """What `nn.GroupNorm` computes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each group of channels."""
        if torch.is_grad_enabled() and self.weight is not None and not torch.compiler.is_compiling() and self._slow(x):
            y: Tensor = _Normalize.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return y
        return super().forward(x)

    def _slow(self, x: Tensor) -> bool:
        is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return x.device.type == "cpu" and is_last and self.num_channels // self.num_groups < _WIDE.get(x.dtype, 0)


def speed_up_group_norms(module: nn.Module) -> None:
    """Let a model's own modules compute as ours; their parameters stay what they are."""
    for child in module.modules():
        if type(child) is nn.GroupNorm:
            child.__class__ = GroupNorm


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        count, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, count, channels, height * width, num_groups, eps)
        context.save_for_backward(x, weight, mean, rstd, bias)
        context.num_groups, context.eps = num_groups, eps
        return y

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With y = weight (x - mean) rstd + bias: dx = a dy + b x + c, where a, b, c are numbers for each channel.

        b and c hold what the mean and the deviation contribute, from two sums over a group: dy weight x, dy weight.
        """
        x, weight, mean, rstd, bias = context.saved_tensors
        if torch.is_grad_enabled():  # for a gradient of the gradient
            again = nn.functional.group_norm(x, context.num_groups, weight, bias, context.eps)
            given = (x, weight, bias)
            needed = [each for each, is_needed in zip(given, context.needs_input_grad, strict=False) if is_needed]
            found = iter(torch.autograd.grad(again, needed, gradients, create_graph=True))
            return *(next(found) if is_needed else None for is_needed in context.needs_input_grad[:3]), None, None
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        count, channels, height, width = x.shape
        groups, area = mean.shape[1], height * width
        rows, d_rows = (t.permute(0, 2, 3, 1).reshape(count, area, channels) for t in (x, dy))
        step = max(_BLOCK // channels, 1)
        blocks = [(n, slice(at, at + step)) for n in range(count) for at in range(0, area, step)]

        sums = torch.zeros(2, count, channels)
        for n, some in blocks:
            d = d_rows[n, some].float()
            sums[1, n] += d.sum(0)
            sums[0, n] += (d * rows[n, some]).sum(0)

        mean, rstd, scale = mean.float(), rstd.float(), weight.float()
        of_x, of_one = (sums * scale).unflatten(2, (groups, -1)).sum(3) / (area * channels // groups)
        b = (of_one * mean - of_x) * rstd**3
        c = -b * mean - of_one * rstd
        b, c, mean, rstd = (each.repeat_interleave(channels // groups, 1) for each in (b, c, mean, rstd))
        a = scale * rstd

        dx = torch.empty_like(rows)
        for n, some in blocks:
            dx[n, some] = torch.addcmul(c[n], d_rows[n, some].float(), a[n]).addcmul_(rows[n, some].float(), b[n])
        d_weight = ((sums[0] - sums[1] * mean) * rstd).sum(0).to(weight.dtype)
        d_bias = sums[1].sum(0).to(weight.dtype)
        return dx.unflatten(1, (height, width)).permute(0, 3, 1, 2), d_weight, d_bias, None, None
