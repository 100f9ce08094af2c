"""What a backbone is to objectives and samplers, and what an objective is to the training loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Latents = Float[Tensor, "n c h w"] | Int64[Tensor, "n h w"]
"""What a generator models: normalized latents, or tokens."""

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A backbone: noisy latents (n, c, h, w), times (n,) and labels (n,) int64 to an output (n, c or 2c, h, w).

The times are those of the process that the backbone was trained for: steps 0 ... 999 of a diffusion, or an
interpolant's t in [0, 1] in the interpolant's own direction. The label `num_classes` means "no class"."""


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How a generator of latents reads its cache."""

    owner: ClassVar[str] = "DiT, SiT or GAT"

    normalization: str = "measured"
    """Latents: `measured`: by the cache's mean and standard deviation of each channel; `fixed:0.18215`: times that
    factor."""

    posterior: Literal["sample", "mean"] = "sample"
    """Latents: train on a fresh sample of each posterior, or on its mean."""


@dataclass(frozen=True, kw_only=True)
class LatentSpecification:
    """What a generator has to know of the latents that it models."""

    channels: int
    """Of tokens: the codes of their codebook."""

    height: int
    """Cells."""

    width: int
    """Cells."""

    num_classes: int
    """Labels are 0 ... num_classes - 1, and `num_classes` itself means "no class"; 0: unconditional."""

    def __post_init__(self) -> None:
        if min(self.channels, self.height, self.width) < 1 or self.num_classes < 0:
            raise ValueError(f"{self} describes no latents")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width

    def resized(self, height: int, width: int) -> "LatentSpecification":
        """Describe the same latents in another shape."""
        return replace(self, height=height, width=width)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """An objective's value for each image."""

    total: Float[Tensor, " n"]
    """What the gradient is taken of, after the mean over images."""

    parts: dict[str, Float[Tensor, " n"]]
    """The terms under their names, as the journal logs them; each before its weight."""


class Coupling(NamedTuple):
    """Means, over training times, of what scales latent and noise: in what a backbone sees, and in what it answers.

    It sees `alpha z + sigma epsilon` and learns to answer `a z + b epsilon`; see `eqvae.generators.alignment`.
    """

    alpha: float
    alpha_square: float
    sigma_square: float
    a: float
    a_square: float
    b_square: float

    @classmethod
    def of(cls, alpha: Tensor, sigma: Tensor, a: Tensor, b: Tensor) -> "Coupling":
        """Average over times, which are the tensors' elements."""
        means = (alpha, alpha.square(), sigma.square(), a, a.square(), b.square())
        return cls(*(mean.double().mean().item() for mean in means))


class Objective(ABC):
    """What a backbone is trained for. An objective has no weights and no randomness of its own."""

    def coupling(self) -> Coupling | None:
        """Say how latents and noise are mixed; None: its backbone can't be aligned with other latents."""
        return None

    @abstractmethod
    def out_channels(self, channels: int) -> int:
        """Say how wide the backbone's output is."""

    @abstractmethod
    def draw(self, num: int, specification: LatentSpecification, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw all random numbers of one training step, so that each process can take its rows of the global batch."""

    @abstractmethod
    def loss(
        self, predict: Callable[..., Tensor], latents: Latents, labels: Int64[Tensor, " n"], draws: Mapping[str, Tensor]
    ) -> Loss:
        """Compute the training loss, differentiable with respect to the backbone's weights."""


def drop_labels(
    labels: Int64[Tensor, " n"], uniform: Float[Tensor, " n"], *, probability: float, null_label: int
) -> Int64[Tensor, " n"]:
    """Replace labels by "no class", so that one backbone learns both terms of classifier-free guidance."""
    return torch.where(uniform < probability, null_label, labels)
