"""Feature statistics of a set of images: what a score compares, with where it came from; saved and reused."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eqvae.artifacts.files import check_finite, expanded, read_tensors, write_tensors
from eqvae.artifacts.parsing import parse_json
from eqvae.artifacts.sample_sets import MOMENT_KEYS, has_images, moments_in, read_array, reading
from eqvae.artifacts.typed import to_record
from eqvae.errors import UserError
from eqvae.images import check_broken
from eqvae.images.image_sets import ImageSet
from eqvae.metrics.frechet import FeatureMoments
from eqvae.networks.features import INCEPTION, FeatureExtractor, Features
from eqvae.runtime.device import Precision
from eqvae.runtime.processes import Processes

STATISTICS_SUFFIX = ".safetensors"

_FORMAT = "eqvae.feature_statistics.1"
_ROWS_PER_UPDATE = 1024
"""Rows that one update of the moments takes in: fewer would move the covariance through memory more often."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where statistics come from."""

    data: str
    """The set's name, as the user gave it."""

    fingerprint: str
    """Digest of the 8-bit pixels in order, or of the moments where a file gave nothing else; 16 hexadecimal digits."""

    features: str
    """What `load_features` was asked for."""

    weights_fingerprint: str | None
    """Of the features' weights; None where a file doesn't say."""

    image_size_px: int | str | None
    """Side of the images, or `192x256` for height x width; None where a file doesn't say."""

    num_channels: int = 3
    """Of the images."""

    precision: Precision = "fp32"
    """In which the features were computed."""

    moments: Literal["images", "file"] = "images"
    """Whether mean and covariance were computed from these images, or given by an ADM reference batch, which then
    stand for a larger set."""


@final
@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Moments and features of a set of images."""

    mean: Float[Tensor, " d"]
    """Of the pooled features, float64."""

    covariance: Float[Tensor, "d d"]
    """Unbiased, float64."""

    spatial_mean: Float[Tensor, " e"] | None
    """Of the spatial features, float64."""

    spatial_covariance: Float[Tensor, "e e"] | None
    """Unbiased, float64."""

    pooled: Float[Tensor, "n d"] | None
    """The pooled features, float32, one row for each image; None where a file gave moments alone."""

    logits: Float[Tensor, "n k"] | None
    """For the Inception Score, where they were asked for and the network has a classifier."""

    provenance: Provenance

    @property
    def num_images(self) -> int | None:
        """How many images there are; None where a file gave moments alone."""
        return None if self.pooled is None else len(self.pooled)

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        tensors = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        write_tensors(path, tensors, {"format": _FORMAT, "provenance": json.dumps(asdict(self.provenance))})

    @classmethod
    def load(cls, path: Path) -> "FeatureStatistics":
        """Read what `save` wrote."""
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise UserError(f"'{path}' holds no feature statistics", "Write them with --save-reference")
        mend = "Write them again with --save-reference"
        check_finite(tensors, source=str(path), mend=mend)
        try:
            provenance = to_record(Provenance, parse_json(metadata["provenance"]))
            _check_statistics(tensors)
        except (ValueError, KeyError, RecursionError) as error:
            raise UserError(f"'{path}' holds damaged feature statistics ({error})", mend) from None
        return cls(**{name: tensors.get(name) for name in _TENSORS}, provenance=provenance)  # type: ignore[arg-type]


def _check_statistics(tensors: Mapping[str, Tensor]) -> None:
    """Hold the shapes of statistics against each other."""
    if not {"mean", "covariance"} <= tensors.keys() <= set(_TENSORS):
        raise ValueError(f"it has {', '.join(tensors)}")
    for name, tensor in tensors.items():
        dims = 1 if name.endswith("mean") else 2
        if tensor.ndim != dims or not tensor.is_floating_point():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}")
    for mean, covariance in (("mean", "covariance"), ("spatial_mean", "spatial_covariance")):
        if (mean in tensors) != (covariance in tensors):
            raise ValueError(f"{mean} and {covariance} belong together")
        if mean in tensors and tensors[covariance].shape != (len(tensors[mean]),) * 2:
            raise ValueError(f"{covariance} does not fit {mean}")
    if "pooled" in tensors and tensors["pooled"].shape[1] != len(tensors["mean"]):
        raise ValueError("pooled does not fit mean")


_TENSORS = ("mean", "covariance", "spatial_mean", "spatial_covariance", "pooled", "logits")


def holds_statistics(path: Path) -> bool:
    """Tell from the header whether a file is one that `FeatureStatistics.save` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def read_statistics(path: Path) -> FeatureStatistics | None:
    """Read a reference that holds no images: saved statistics, or an ADM batch of moments alone; None for others."""
    if path.suffix == STATISTICS_SUFFIX or holds_statistics(path):
        return FeatureStatistics.load(path)
    if path.suffix == ".npz" and moments_in(path) and not has_images(path):
        return with_adm_moments(None, path)
    return None


def find_adm_moments(reference: str, features: str, precision: Precision = "fp32") -> Path | None:
    """Find the ADM batch whose moments count in place of its images' own; they are of Inception's features in fp32."""
    path = expanded(reference)
    if features != INCEPTION or path.suffix != ".npz" or not moments_in(path):
        return None
    if precision != "fp32":
        what = (
            f"The reference '{path}' holds moments of features that were computed in fp32, the samples' in {precision}"
        )
        raise UserError(what, "Use --precision fp32")
    return path


def with_adm_moments(statistics: FeatureStatistics | None, path: Path) -> FeatureStatistics:
    """Take the moments that an ADM reference batch holds, as ADM's evaluator does: they stand for a larger set."""
    with reading(path):
        given = {key: read_array(path, key).astype(np.float64) for key in MOMENT_KEYS if key in moments_in(path)}
    moments = {key: torch.from_numpy(value) for key, value in given.items()}
    for mean_key, covariance_key in (("mu", "sigma"), ("mu_s", "sigma_s")):
        mean, covariance = moments.get(mean_key), moments.get(covariance_key)
        if mean is None and covariance is None and mean_key != "mu":
            continue
        if mean is None or covariance is None or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = {key: tuple(value.shape) for key, value in moments.items()}
            raise UserError(f"'{path}' holds no mean and covariance that fit together ({shapes})", "Fetch it again")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"'{path}' holds a '{mean_key}' or '{covariance_key}' that is not finite", "Fetch it again")
    digest = hashlib.sha256(b"".join(given[key].tobytes() for key in MOMENT_KEYS if key in given)).hexdigest()[:16]
    known: dict[str, Any] = {
        "mean": moments["mu"],
        "covariance": moments["sigma"],
        "spatial_mean": moments.get("mu_s"),
        "spatial_covariance": moments.get("sigma_s"),
    }
    if statistics is not None:
        return replace(statistics, **known, provenance=replace(statistics.provenance, moments="file"))
    provenance = Provenance(
        data=str(path), fingerprint=digest, features=INCEPTION, weights_fingerprint=None, image_size_px=None,
        moments="file",
    )  # fmt: skip
    return FeatureStatistics(**known, pooled=None, logits=None, provenance=provenance)


@torch.inference_mode()
def compute_statistics(
    extractor: FeatureExtractor,
    images: ImageSet,
    *,
    indices: Sequence[int],
    device: torch.device,
    processes: Processes,
    precision: Precision = "fp32",
    batch_size: int = 64,
    num_workers: int = 0,
    keep_logits: bool = False,
    on_batch: Callable[[int], None] = lambda num_images: None,
) -> FeatureStatistics:
    """Extract features and gather their statistics. All processes call it, each reads its part of the images.

    Neither the batch size nor the number of processes shows in the result, but for float32 rounding of the features.
    """
    own = indices[processes.own_part(len(indices))]
    pooled: list[Tensor] = []
    logits: list[Tensor] = []
    digests: list[bytes] = []
    spatial = _BlockedMoments()
    for batch in images.batches(own, batch_size=batch_size, num_workers=num_workers):
        digests.append(_digest_images(batch))
        features = extractor.extract(batch.to(device), precision)
        _check_finite(features, extractor, images)
        pooled.append(features.pooled.cpu())
        if keep_logits and features.logits is not None:
            logits.append(features.logits.cpu())
        if features.spatial is not None:
            spatial.add(features.spatial)
        on_batch(len(batch))
    images.broken[:] = [name for names in processes.gather(images.broken) for name in names]
    if images.broken:
        check_broken(images.name, len(images), len(images.broken), images.broken[0])
    all_pooled = _gather_rows(pooled, processes)
    if all_pooled is None or len(all_pooled) < 2:
        raise UserError(f"'{images.name}' has fewer than two images to compare", "Give more images")
    moments = _BlockedMoments()
    moments.add(all_pooled.to(device))  # of all images at once: cut in the same places whoever computed them
    pooled_moments, spatial_moments = moments.finish(), spatial.finish().summed_over(processes)
    has_spatial = spatial_moments.count > 0
    fingerprint = hashlib.sha256(b"".join(b"".join(part) for part in processes.gather(digests))).hexdigest()[:16]
    return FeatureStatistics(
        mean=pooled_moments.mean.cpu(),
        covariance=pooled_moments.covariance.cpu(),
        spatial_mean=spatial_moments.mean.cpu() if has_spatial else None,
        spatial_covariance=spatial_moments.covariance.cpu() if has_spatial else None,
        pooled=all_pooled,
        logits=_gather_rows(logits, processes),
        provenance=Provenance(
            data=images.name,
            fingerprint=fingerprint,
            features=extractor.name,
            weights_fingerprint=extractor.weights_fingerprint,
            image_size_px=images.image_size.written(),
            num_channels=images.num_channels,
            precision=precision,
        ),
    )


class _BlockedMoments:
    """Moments that take their rows in blocks, whatever batches they come in."""

    def __init__(self) -> None:
        self._moments = FeatureMoments()
        self._waiting: list[Tensor] = []
        self._num_waiting = 0

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        self._waiting.append(rows)
        self._num_waiting += len(rows)
        if self._num_waiting >= _ROWS_PER_UPDATE:
            joined = torch.cat(self._waiting)
            num_whole = len(joined) // _ROWS_PER_UPDATE * _ROWS_PER_UPDATE
            for block in joined[:num_whole].split(_ROWS_PER_UPDATE):
                self._moments.add(block)
            self._waiting, self._num_waiting = [joined[num_whole:]], len(joined) - num_whole

    def finish(self) -> FeatureMoments:
        if self._num_waiting:
            self._moments.add(torch.cat(self._waiting))
            self._waiting, self._num_waiting = [], 0
        return self._moments


def _gather_rows(parts: list[Tensor], processes: Processes) -> Tensor | None:
    """Join the rows of all processes in their order; None where there are none."""
    own = torch.cat(parts) if parts else None
    rows = [each for each in processes.gather(own) if each is not None]
    return torch.cat(rows) if rows else None


def _digest_images(images: UInt8[Tensor, "n k h w"]) -> bytes:
    """Digest each image by itself, so that processes can share the work: 32 bytes for each."""
    pixels: Iterable[np.ndarray] = images.permute(0, 2, 3, 1).contiguous().numpy()
    return b"".join(hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest() for image in pixels)


def _check_finite(features: Features, extractor: FeatureExtractor, images: ImageSet) -> None:
    for values in (features.pooled, features.spatial, features.logits):
        if values is not None and not bool(values.isfinite().all()):
            raise UserError(
                f"--features {extractor.name} gives NaN or infinite features for images of '{images.name}'",
                "Are its weights damaged? Check --weights, or try --precision fp32",
            )
