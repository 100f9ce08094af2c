"""Frechet distance between two sets of feature vectors, each taken for a Gaussian (Heusel et al., arXiv:1706.08500).

With Inception's features it is the FID. Moments are streamed in float64; the matrix square root's trace comes from
symmetric eigenvalues and singular values, which neither turn complex nor need an offset where a covariance is singular.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.errors import UserError
from eqvae.runtime.processes import Processes


class FeatureMoments:
    """Count, mean and covariance of feature vectors that come in batches.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979): each brings the second moment about its
    own mean. Sums of raw squares would lose, where the mean is large, the digits that a covariance is made of, and a
    shift by the first batch's mean would let figures depend on which batch came first.
    """

    def __init__(self) -> None:
        """Start without any features; the first batch fixes their number and the device."""
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # the sum of outer products about the mean

    def add(self, features: Float[Tensor, "n d"]) -> None:
        if len(features) == 0:
            return
        x = (features.cpu() if features.device.type == "mps" else features).double()
        mean = x.mean(0)
        self._add(len(x), mean, x - mean)

    def merge(self, other: "FeatureMoments") -> None:
        """Take in what another one has seen."""
        if other.count == 0:
            return
        self._add(other.count, other._mean, other._mean.new_empty((0, len(other._mean))))
        self._scatter += other._scatter.to(self._scatter.device)

    def summed_over(self, processes: Processes) -> "FeatureMoments":
        """Bring together what several processes have seen, by sums of plain tensors."""
        num_features = max(processes.gather(len(self._mean)))
        own = FeatureMoments()
        own._resize(num_features, self._mean.device)
        own.merge(self)
        total = FeatureMoments()
        total.count = int(processes.sum(torch.tensor(self.count)))
        total._mean = processes.sum(own._mean * self.count) / max(1, total.count)
        offset = own._mean - total._mean
        total._scatter = processes.sum(own._scatter + self.count * torch.outer(offset, offset))
        return total

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean, float64."""
        return self._mean

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance (divided by `count - 1`, as `numpy.cov` and ADM do), float64."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images in each set; there are {self.count} in one")
        return self._scatter / (self.count - 1)

    def _add(self, count: int, mean: Float[Tensor, " d"], centred: Float[Tensor, "n d"]) -> None:
        """Merge a set of known mean: Equation 2.1 of Chan, Golub and LeVeque, for vectors."""
        if self.count == 0:
            self._resize(len(mean), mean.device)
        if len(mean) != len(self._mean):
            raise ValueError(f"moments of {len(self._mean)} features meet vectors of {len(mean)}")
        mean, centred = mean.to(self._mean.device), centred.to(self._mean.device)
        offset = mean - self._mean
        total = self.count + count
        between = offset * (self.count * count / total) ** 0.5
        rows = torch.cat([centred, between[None]])
        self._scatter.addmm_(rows.T, rows)
        self._mean = self._mean + offset * (count / total)
        self.count = total

    def _resize(self, num_features: int, device: torch.device) -> None:
        self._mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)


def frechet_distance(
    mean_a: Float[Tensor, " d"],
    covariance_a: Float[Tensor, "d d"],
    mean_b: Float[Tensor, " d"],
    covariance_b: Float[Tensor, "d d"],
) -> float:
    """Measure the distance between two Gaussians; the order does not matter, but only b is asked to vary.

    `|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A^(1/2) B A^(1/2))^(1/2))` (Equation 6 of arXiv:1706.08500, whose
    `(A B)^(1/2)` has the same trace). With `A = F F^T` and `B = G G^T` from eigenvalues, that last trace is the sum of
    the singular values of `F^T G`: roots of eigenvalues of `A^(1/2) B A^(1/2)` would turn rounding of 1e-16 into 1e-8.

    Args:
        mean_a: Of the samples' features.
        covariance_a: Of the same; may be singular. Only its symmetric part counts.
        mean_b: Of the reference's features.
        covariance_b: Of the same.

    Returns:
        At least 0, in squared units of the features; 0 for equal Gaussians up to rounding.

    Raises:
        UserError: If a number is not finite, or if the features of b do not vary at all.
    """
    mean_a, covariance_a, mean_b, covariance_b = (
        each.double() for each in (mean_a, covariance_a, mean_b, covariance_b)
    )
    for name, values in {"first": (mean_a, covariance_a), "second": (mean_b, covariance_b)}.items():
        if not all(bool(each.isfinite().all()) for each in values):
            raise UserError(
                f"the features of the {name} set have NaN or infinite moments",
                "Look for images that are not finite and for overflow in half precision",
            )
    squared_resolution = (1e-12 * mean_b).square().sum()  # float64 rounding of equal features stays far below
    if covariance_b.trace() <= squared_resolution:
        raise UserError(
            "the features of the reference do not vary: all its images look the same", "Take more, or other images"
        )
    overlap = torch.linalg.svdvals(_factor(covariance_a).T @ _factor(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2.0 * overlap
    return max(0.0, float(distance))


def _factor(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d r"]:
    """Split a covariance into F F^T, F of full column rank; eigenvalues no larger than rounding count as 0."""
    eigenvalues, eigenvectors = torch.linalg.eigh(0.5 * (covariance + covariance.T))
    rounding = len(covariance) * torch.finfo(torch.float64).eps * eigenvalues.abs().amax()
    kept = eigenvalues > rounding
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()
