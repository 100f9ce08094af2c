"""GroupNorm forward and backward in channels-last, against PyTorch's: by default SD-VAE's widest layers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Turn, Variant, Work
from eqvae.runtime.device import Precision, choose_device
from eqvae.runtime.group_norm import GroupNorm
from eqvae.runtime.seeds import generator_for

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class GroupNorms(Work):
    """GroupNorm's forward and backward pass in channels-last, against PyTorch's."""

    unit = "layer"

    batch_size: int = 1

    channels: int = 128

    groups: int = 32

    image_size: int = 256
    """Side of the feature map."""

    precision: Precision = "bf16"

    repetitions: int = 20
    """Of a turn."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "PyTorch's": Variant(lambda _: self.prepare(nn.GroupNorm), self.precision),
            "ours": Variant(lambda _: self.prepare(GroupNorm), self.precision),
        }

    def draw(self, number: int) -> Tensor:
        """Draw a feature map."""
        shape = (self.batch_size, self.channels, self.image_size, self.image_size)
        values = torch.randn(shape, generator=generator_for(number)).to(choose_device(self.device))
        return values.to(DTYPES[self.precision], memory_format=torch.channels_last)

    def check(self) -> None:
        """Compare the gradients."""
        theirs, ours = (self.gradient(kind(self.groups, self.channels)) for kind in (nn.GroupNorm, GroupNorm))
        if (theirs - ours).abs().max() > 1e-2 * theirs.abs().max():
            raise SystemExit("the gradients differ")

    def gradient(self, layer: nn.GroupNorm) -> Tensor:
        """Pass through a layer and back."""
        x = self.draw(0).requires_grad_()
        return torch.autograd.grad(layer.to(x.device)(x), x, self.draw(1))[0].float()

    def prepare(self, kind: type[nn.GroupNorm]) -> Turn:
        """Pass through one of them and back."""
        x, dy = self.draw(0).requires_grad_(), self.draw(1)
        layer = kind(self.groups, self.channels).to(x.device)

        def take_turn() -> dict[str, Any]:
            for _ in range(self.repetitions):
                torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dy)
            return {"units": self.repetitions}

        return take_turn
