"""Per-channel statistics of cached latents, added up shard by shard."""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS_AT_A_TIME = 64
"""Float64 takes four times the bytes of what is stored: a shard is summed in pieces."""


@final
@dataclass(frozen=True, kw_only=True)
class LatentMeasures:
    """Per-channel statistics over images, mirror images and positions; raw latents."""

    mean: tuple[float, ...]

    std: tuple[float, ...]
    """Of posterior samples: by the law of total variance, the variance of the means plus the mean of the variances."""

    std_of_means: tuple[float, ...]
    """Of posterior means alone; equal to `std` for a deterministic encoder."""


@final
@dataclass(frozen=True, kw_only=True)
class MomentSums:
    """Sums from which the statistics follow. Those of two sets of latents are added."""

    count: int
    """Values summed in each channel."""

    means: tuple[float, ...]
    """Sum of the posterior means, per channel."""

    squares: tuple[float, ...]
    """Sum of their squares."""

    variances: tuple[float, ...]
    """Sum of the posterior variances; zero for a deterministic encoder."""

    @classmethod
    def of(cls, mean: Float[Tensor, "n c h w"], std: Float[Tensor, "n c h w"] | None) -> "MomentSums":
        """Sum one shard in float64."""
        totals = torch.zeros(3, mean.shape[1], dtype=torch.float64)
        for start in range(0, len(mean), _ROWS_AT_A_TIME):
            means = mean[start : start + _ROWS_AT_A_TIME].double()
            totals[0] += means.sum((0, 2, 3))
            totals[1] += means.square().sum((0, 2, 3))
            if std is not None:
                totals[2] += std[start : start + _ROWS_AT_A_TIME].double().square().sum((0, 2, 3))
        count = mean.shape[0] * mean.shape[2] * mean.shape[3]
        means_sum, squares, variances = (tuple(row) for row in totals.tolist())
        return cls(count=count, means=means_sum, squares=squares, variances=variances)

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "MomentSums":
        """Read what `artifacts.to_plain` made."""
        return cls(
            count=int(content["count"]),
            means=tuple(content["means"]),
            squares=tuple(content["squares"]),
            variances=tuple(content["variances"]),
        )

    def __add__(self, other: "MomentSums") -> "MomentSums":
        """Add the sums of another set of latents."""

        def add(one: tuple[float, ...], two: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(a + b for a, b in zip(one, two, strict=True))

        return MomentSums(
            count=self.count + other.count,
            means=add(self.means, other.means),
            squares=add(self.squares, other.squares),
            variances=add(self.variances, other.variances),
        )

    def measures(self) -> LatentMeasures:
        """Finish."""
        mean = [total / self.count for total in self.means]
        variance_of_means = [max(total / self.count - m**2, 0.0) for total, m in zip(self.squares, mean, strict=True)]
        variance = [v + total / self.count for v, total in zip(variance_of_means, self.variances, strict=True)]
        return LatentMeasures(
            mean=tuple(mean),
            std=tuple(v**0.5 for v in variance),
            std_of_means=tuple(v**0.5 for v in variance_of_means),
        )
