"""Which figures a report's tables and cards show, by what the evaluations have measured."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eqvae.report.folders import Evaluation
from eqvae.report.tables import METRICS, Metric, figure

DISTANCE = re.compile(r"([ri])(fid|fd_[a-z0-9_]+?)(?:_(?:rotation|scale)(?:_[0-9.]+)?)?")
"""Keys of Frechet distances: of reconstructions (r) or interpolations (i), plain or after a transformation."""

INTRINSIC_DIMENSION = Metric(
    key="intrinsic_dimension", label="Intrinsic dimension", digits=1, error_key="intrinsic_dimension_standard_error"
)
SPECTRUM_EXCESS = Metric(key="spectrum_excess_db", label="Spectrum excess", digits=1, unit="dB")


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A Frechet distance with certain features; only Inception's make it an FID."""

    key: str
    """Of the plain one, e.g. `rfid` or `rfd_efficientnet_lite0`."""

    features: str
    """As the user named them."""

    digits: int
    """After the decimal point, for the largest of the figures to be told apart."""

    @property
    def is_fid(self) -> bool:
        """Whether published figures may be set beside it."""
        return self.features == "inception"

    @property
    def label(self) -> str:
        """For example `rFID` or `rFD (efficientnet-lite0)`."""
        return f"{self.key[0]}FID" if self.is_fid else f"{self.key[0]}FD ({self.features})"

    @property
    def metric(self) -> Metric:
        """The distance without a transformation, as a column."""
        return Metric(key=self.key, label=self.label, digits=self.digits)


def distances(evaluations: Sequence[Evaluation], kind: str) -> tuple[Distance, ...]:
    """Find the Frechet distances that were measured, plain or after transformations."""
    found: dict[str, Distance] = {}
    for item in evaluations:
        for key in item.metrics:
            match = DISTANCE.fullmatch(key)
            if match is None or match[1] != kind or figure(item, key) is None:
                continue
            plain = match[1] + match[2]
            if plain not in found:
                found[plain] = Distance(
                    key=plain, features=_features(item, match[2]), digits=_digits(evaluations, plain)
                )
    return tuple(found.values())


def main_columns(evaluations: Sequence[Evaluation]) -> tuple[Metric, ...]:
    """Choose the main table's columns: equivariance, then reconstruction."""
    errors = [metric for metric in METRICS if metric.key.startswith("equivariance_error")]
    others = [metric for metric in METRICS if not metric.key.startswith("equivariance_error")]
    if predictor_columns(evaluations):
        others = [metric for metric in others if metric.key != "latent_std"]
    return (*errors, *(distance.metric for distance in distances(evaluations, "r")), *others)


def predictor_columns(evaluations: Sequence[Evaluation]) -> tuple[Metric, ...]:
    """Choose the columns of the table of what predicts a generator's quality without training one."""
    interpolations = (distance.metric for distance in distances(evaluations, "i"))
    geometry = (INTRINSIC_DIMENSION, *interpolations, SPECTRUM_EXCESS)
    if not any(figure(item, metric.key) is not None for item in evaluations for metric in geometry):
        return ()
    known = {metric.key: metric for metric in METRICS}
    shared = (known["equivariance_error_rotation"], known["equivariance_error_scale"], known["latent_std"])
    return (*geometry, *shared)


def _features(evaluation: Evaluation, suffix: str) -> str:
    """The name in the evaluation's config where it is the one that made the key, which has no hyphens."""
    if suffix == "fid":
        return "inception"
    slug = suffix.removeprefix("fd_")
    named = str(evaluation.config.get("features", ""))
    return named if re.sub("[^a-z0-9]+", "_", named.lower()) == slug else slug.replace("_", "-")


def _digits(evaluations: Sequence[Evaluation], key: str) -> int:
    """Features differ in scale by orders of magnitude; Inception's distances get the two digits that papers print."""
    largest = max((value for item in evaluations if (value := figure(item, key)) is not None), default=0.0)
    if key[1:] == "fid":
        return 2
    return next((digits for bound, digits in ((100.0, 1), (1.0, 2), (0.1, 3)) if largest >= bound), 4)


def card_columns(evaluations: Sequence[Evaluation]) -> tuple[Metric, ...]:
    """Choose the figures that stand on the autoencoders' cards: what the charts there do not say."""
    known = {metric.key: metric for metric in METRICS}
    reconstruction = (*(distance.metric for distance in distances(evaluations, "r")), known["psnr_db"])
    equivariance = (known["equivariance_error_rotation"], known["equivariance_error_scale"])
    geometry = (INTRINSIC_DIMENSION, *(distance.metric for distance in distances(evaluations, "i")))
    tokens = (known["token_agreement_rotation"], known["token_agreement_scale"])
    measured = (metric for metric in tokens if any(figure(item, metric.key) is not None for item in evaluations))
    return (*reconstruction, *equivariance, *geometry, *measured)
