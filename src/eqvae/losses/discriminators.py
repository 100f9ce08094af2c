"""Discriminators: PatchGAN, and heads on the features of a frozen network."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from eqvae.artifacts.channels import mean_over_triples
from eqvae.artifacts.files import fingerprint
from eqvae.networks.feature_maps import FeatureMaps
from eqvae.runtime.processes import count_processes, sum_with_gradient

_HEAD_WIDTH = 64


class Discriminator(nn.Module, ABC):
    """Images in [-1, 1] to logits of being real, (n, heads, h, w), one for each head and place."""

    architecture: ClassVar[str]
    """As an exported one's `config.json` names it."""

    prefix: ClassVar[str]
    """What stands before the names of its weights in files."""

    min_image_size_px: int

    @property
    def learned(self) -> nn.Module:
        """What is trained, kept in checkpoints and exported."""
        return self

    @property
    @abstractmethod
    def title(self) -> str:
        """As messages name it."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """All that it takes to build it again."""

    def fingerprint(self) -> str:
        """Digest the weights that are trained."""
        return fingerprint(self.learned.state_dict().items())


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the batch of all processes together, on any device (PyTorch's needs accelerators)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the global batch's mean and variance."""
        num_processes = count_processes()
        if num_processes == 1 or not self.training:
            return super().forward(input)
        values = input.float()
        count = num_processes * values[:, 0].numel()
        mean = sum_with_gradient(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = sum_with_gradient(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


MIN_IMAGE_SIZE_PX = 24
"""The smallest image on which three layers of PatchGAN leave a patch."""


@final
class PatchDiscriminator(Discriminator, nn.Sequential):
    """PatchGAN (Isola et al., 2017): a logit for each patch of 70 px; `N.weight` is `main.N.weight` elsewhere."""

    architecture = "patchgan"
    prefix = "main."

    def __init__(self, width: int = 64, num_layers: int = 3, image_channels: int = 3) -> None:
        """Build with LDM's initialization: weights N(0, 0.02), batch normalization scales N(1, 0.02)."""
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, num_layers + 1):
            wider = width * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                GlobalBatchNorm(wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        super().__init__(*layers)
        self.width, self.num_layers, self.image_channels = width, num_layers, image_channels
        self.min_image_size_px = 3 * 2**num_layers
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    @property
    def title(self) -> str:
        """As messages name it."""
        return f"PatchGAN of {self.num_layers} layers and width {self.width}"

    def description(self) -> dict[str, Any]:
        """Name the sizes, which the weights' shapes say too."""
        sizes = {"width": self.width, "num_layers": self.num_layers, "image_channels": self.image_channels}
        return {"architecture": self.architecture, **sizes}


@final
class FeatureDiscriminator(Discriminator):
    """Light heads on several stages of a frozen network, which is neither trained nor kept (arXiv:2111.01007).

    As StyleGAN-XL, StyleGAN-T and VAR's tokenizer have them, without their augmentation. Each head brings its stage to
    the coarsest one's grid, so that all stages weigh alike whatever the picture's size.
    """

    architecture = "features"
    prefix = "heads."

    def __init__(self, maps: FeatureMaps) -> None:
        """Build heads with PyTorch's first weights."""
        super().__init__()
        self.maps = maps
        coarsest = max(maps.strides)
        self.min_image_size_px = 2 * coarsest  # batch normalization needs more than one place
        self.heads = nn.ModuleList(
            _head(channels, num_halvings=round(math.log2(coarsest / stride)))
            for channels, stride in zip(maps.channels, maps.strides, strict=True)
        )

    @property
    def learned(self) -> nn.Module:
        """The heads."""
        return self.heads

    @property
    def title(self) -> str:
        """As messages name it."""
        return f"{len(self.heads)} heads on {self.maps.name}"

    def description(self) -> dict[str, Any]:
        """Name the frozen network, and the weights without which the heads mean nothing."""
        return {
            "architecture": self.architecture,
            "features": self.maps.name,
            "features_fingerprint": self.maps.fingerprint(),
        }

    def forward(self, x: Float[Tensor, "n k h w"]) -> Float[Tensor, "n heads _ _"]:
        """Let each head judge its stage; channels other than three are seen in triples."""
        return mean_over_triples(self._judge, x)

    def _judge(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n heads _ _"]:
        logits = [head(features) for head, features in zip(self.heads, self.maps(x), strict=True)]
        # A head rounds sizes up; some networks round them down, and have a line less.
        rows, columns = (min(each.shape[axis] for each in logits) for axis in (-2, -1))
        return torch.cat([each[..., :rows, :columns] for each in logits], dim=1)


def _head(channels: int, *, num_halvings: int) -> nn.Sequential:
    """Build what makes logits of a stage, at a grid that is so many times coarser."""
    layers: list[nn.Module] = [spectral_norm(nn.Conv2d(channels, _HEAD_WIDTH, 1)), nn.LeakyReLU(0.2)]
    for stride in (*[2] * num_halvings, 1):
        layers += [
            spectral_norm(nn.Conv2d(_HEAD_WIDTH, _HEAD_WIDTH, 3, stride=stride, padding=1, bias=False)),
            GlobalBatchNorm(_HEAD_WIDTH),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(_HEAD_WIDTH, 1, 3, padding=1)))


def build_discriminator(seed: int, maps: FeatureMaps | None = None, *, image_channels: int = 3) -> Discriminator:
    """Build a discriminator, on a frozen network or PatchGAN, whose first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminator(image_channels=image_channels) if maps is None else FeatureDiscriminator(maps)
