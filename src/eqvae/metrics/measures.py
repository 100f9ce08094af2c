"""What `eqvae evaluate` measures beyond single images: distances of sets of images, and the latents' geometry.

A measure watches the pass over the images, brings together what several processes have seen, and has its figures at the
end. Frechet distances are named by their features: `rfid` with Inception's, `rfd_efficientnet_lite0` with others (see
`metric_key`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eqvae.artifacts.records import to_uint8
from eqvae.errors import UserError
from eqvae.losses.reconstruction import FeatureDistance
from eqvae.metrics.frechet import FeatureMoments, frechet_distance
from eqvae.metrics.interpolation import Interpolations, choose_partners, midpoints
from eqvae.metrics.intrinsic_dimension import intrinsic_dimension
from eqvae.metrics.spectrum import SpectrumSums, high_frequency_excess_db, images_on_latent_grid
from eqvae.networks.features import FeatureExtractor, metric_key
from eqvae.networks.pretrained import fuse_for_inference
from eqvae.runtime.device import Precision, place
from eqvae.runtime.journal import say_once
from eqvae.runtime.processes import Processes
from eqvae.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class CodedBatch:
    """A batch on its way through the autoencoder."""

    x: Float[Tensor, "n k h w"]
    """Images in [-1, 1]."""

    z: Float[Tensor, "n c h2 w2"]
    """E(x): posterior means, raw."""

    images: UInt8[Tensor, "n k h w"]
    """x in 8 bits."""

    reconstructions: UInt8[Tensor, "n k h w"]
    """D(E(x)) in 8 bits."""

    decode: Callable[[Tensor], Tensor]
    """D: raw latents to images in [-1, 1]."""


class Measure(ABC):
    """Watches the batches of an evaluation."""

    @abstractmethod
    def add(self, batch: CodedBatch) -> None:
        """Take in a batch."""

    @abstractmethod
    def gather(self, processes: Processes) -> None:
        """Bring together what several processes have seen; all of them call it, after the last batch."""

    @abstractmethod
    def figures(self) -> dict[str, float | int]:
        """Finish."""


class ReconstructionDistance(Measure):
    """Frechet distance between x and D(E(x)): rFID (Section C.2), or its twin with other features."""

    def __init__(self, features: FeatureExtractor, precision: Precision = "fp32") -> None:
        self.features, self.precision = features, precision
        self.images, self.reconstructions = FeatureMoments(), FeatureMoments()

    def add(self, batch: CodedBatch) -> None:
        self.images.add(self.pooled(batch.images))
        self.reconstructions.add(self.pooled(batch.reconstructions))

    def pooled(self, images: UInt8[Tensor, "n k h w"]) -> Float[Tensor, "n d"]:
        """Compute what is compared."""
        return self.features.extract(images, self.precision).pooled

    def gather(self, processes: Processes) -> None:
        self.images = _summed(self.images, processes)
        self.reconstructions = _summed(self.reconstructions, processes)

    def figures(self) -> dict[str, float | int]:
        """`rfid` or `rfd_FEATURES`; nothing for a single image, which has no distribution."""
        if self.images.count < 2:
            return {}
        return {f"r{metric_key(self.features.name)}": distance_between(self.reconstructions, self.images)}


class TransformedDistance(Measure):
    """Figure 3: Frechet distance between tau(x) and D(tau(E(x))) for each transformation, and the rotations' mean."""

    def __init__(self, reconstruction: ReconstructionDistance, transforms: Mapping[str, Transform]) -> None:
        self.reconstruction, self.transforms = reconstruction, dict(transforms)
        self.moments = {name: (FeatureMoments(), FeatureMoments()) for name in self.transforms}

    def add(self, batch: CodedBatch) -> None:
        for name, tau in self.transforms.items():
            expected, decoded = self.moments[name]
            expected.add(self.reconstruction.pooled(to_uint8(tau(batch.x))))
            decoded.add(self.reconstruction.pooled(to_uint8(batch.decode(tau(batch.z)))))

    def gather(self, processes: Processes) -> None:
        for name, (expected, decoded) in self.moments.items():
            self.moments[name] = _summed(expected, processes), _summed(decoded, processes)

    def figures(self) -> dict[str, float | int]:
        """`rfid_scale_0.5` and so on for each transformation, `rfid_rotation` for the mean over rotations."""
        key = f"r{metric_key(self.reconstruction.features.name)}"
        figures: dict[str, float | int] = {
            f"{key}_{name}": distance_between(decoded, expected) for name, (expected, decoded) in self.moments.items()
        }
        rotations = [figures[f"{key}_{name}"] for name in self.transforms if name.startswith("rotation")]
        return figures | ({f"{key}_rotation": sum(rotations) / len(rotations)} if rotations else {})


class LatentGeometry(Measure):
    """Intrinsic dimension of the latents (Section B), and iFID: are points between latents still images?

    iFID decodes the midpoint of each latent and a neighbour, and compares the pictures with the images; see
    `eqvae.metrics.interpolation` for the two ways to do it.
    """

    def __init__(
        self,
        reconstruction: ReconstructionDistance | None,
        *,
        seed: int,
        batch_size: int,
        has_dimension: bool = True,
        interpolation: Interpolations = "paper",
    ) -> None:
        """Measure both; without `reconstruction`, whose features and images iFID needs, only the dimension."""
        self.reconstruction, self.seed, self.batch_size = reconstruction, seed, batch_size
        self.has_dimension, self.interpolation = has_dimension, interpolation
        self.latents: list[Tensor] = []
        self.interpolated = FeatureMoments()
        self.decode: Callable[[Tensor], Tensor] | None = None

    def add(self, batch: CodedBatch) -> None:
        """Take in a batch; see `Measure`. Keeps its latents, in float32 on the CPU."""
        self.latents.append(batch.z.float().cpu())
        self.decode = batch.decode

    def gather(self, processes: Processes) -> None:
        """Share latents, and decode between them, each process its part of the batches."""
        gathered = processes.gather(self.latents)
        self.latents = [part for parts in gathered for part in parts]
        decoders = [rank for rank, parts in enumerate(gathered) if parts]
        z = torch.cat(self.latents)
        if self.reconstruction is not None and self.decode is not None and len(z) > 1:
            partners = choose_partners(z, self.interpolation, seed=self.seed)
            for rows in torch.arange(len(z)).split(self.batch_size)[decoders.index(processes.rank) :: len(decoders)]:
                between = midpoints(z[rows], z[partners[rows]], self.interpolation)
                images = to_uint8(self.decode(between.to(processes.device)))
                self.interpolated.add(self.reconstruction.pooled(images))
        self.interpolated = _summed(self.interpolated, processes)

    def figures(self) -> dict[str, float | int]:
        """`intrinsic_dimension`, its standard error, and `ifid` or `ifd_FEATURES`, with `_authors` as they do it."""
        figures = self._dimension() if self.has_dimension else {}
        if self.reconstruction is None:
            return figures
        distance = distance_between(self.interpolated, self.reconstruction.images)
        mark = "" if self.interpolation == "paper" else f"_{self.interpolation}"
        return figures | {f"i{metric_key(self.reconstruction.features.name)}{mark}": distance}

    def _dimension(self) -> dict[str, float | int]:
        latents = torch.cat(self.latents)
        try:
            estimate = intrinsic_dimension(latents.flatten(1), seed=self.seed)
        except ValueError as error:
            raise UserError(f"The intrinsic dimension of {len(latents)} latents: {error}", "Use more images") from None
        figures: dict[str, float | int] = {"intrinsic_dimension": estimate.dimension}
        if estimate.standard_error is not None:
            figures["intrinsic_dimension_standard_error"] = estimate.standard_error
        return figures


class LatentSpectrum(Measure):
    """Radial power spectrum of the latents against the images' own (the diagnosis of arXiv:2502.14831)."""

    def __init__(self) -> None:
        self.latents, self.images = SpectrumSums(), SpectrumSums()

    def add(self, batch: CodedBatch) -> None:
        self.latents.add(batch.z)
        self.images.add(images_on_latent_grid(batch.x, batch.x.shape[-1] // batch.z.shape[-1]))

    def gather(self, processes: Processes) -> None:
        for rank, (latents, images) in enumerate(processes.gather((self.latents, self.images))):
            if rank != processes.rank:
                self.latents.merge(latents)
                self.images.merge(images)

    def curves(self) -> dict[str, list[float]]:
        """Both spectra, for `spectrum.json`; empty where one has none."""
        try:
            latents, images = self.latents.spectrum(), self.images.spectrum()
        except ValueError:
            return {}  # `figures` says why
        return {
            "frequency": latents.frequency.tolist(),
            "latent_power": latents.power.tolist(),
            "image_power": images.power.tolist(),
        }

    def figures(self) -> dict[str, float | int]:
        """`spectrum_excess_db`; see `high_frequency_excess_db`."""
        try:
            return {"spectrum_excess_db": high_frequency_excess_db(self.latents.spectrum(), self.images.spectrum())}
        except ValueError as error:
            say_once(f"spectrum_excess_db is left out: {error}")
            return {}


class PerceptualDistance(Measure):
    """LPIPS' offline twin between x and D(E(x)): unit features of EfficientNet-Lite0, without learned heads."""

    def __init__(self, device: torch.device) -> None:
        distance = FeatureDistance()
        distance.network = fuse_for_inference(distance.network)
        self.distance = place(distance, device)
        self.values: list[Tensor] = []

    def add(self, batch: CodedBatch) -> None:
        pair = (images / 127.5 - 1.0 for images in (batch.images, batch.reconstructions))
        self.values.append(self.distance(*pair).cpu().double())

    def gather(self, processes: Processes) -> None:
        self.values = [part for parts in processes.gather(self.values) for part in parts]

    def figures(self) -> dict[str, float | int]:
        """`perceptual_efficientnet_lite0`, the mean over images."""
        return {"perceptual_efficientnet_lite0": float(torch.cat(self.values).mean())}


PREDICTORS = ("ifid", "spectrum", "dimension")
"""What may predict a generator without training one, by the names of `--watch`."""

MIN_IMAGES = 3
"""TwoNN looks at two neighbours of each latent."""


def predicting_measures(names: Collection[str], features: FeatureExtractor | None, *, batch_size: int) -> list[Measure]:
    """Set up some of `PREDICTORS`; `ifid` needs features, and brings the reconstructions' distance along."""
    measures: list[Measure] = []
    reconstruction = None
    if "ifid" in names and features is not None:
        reconstruction = ReconstructionDistance(features)
        measures.append(reconstruction)
    if "dimension" in names or reconstruction is not None:
        has_dimension = "dimension" in names
        measures.append(LatentGeometry(reconstruction, seed=0, batch_size=batch_size, has_dimension=has_dimension))
    return [*measures, LatentSpectrum()] if "spectrum" in names else measures


def distance_between(pictures: FeatureMoments, reference: FeatureMoments) -> float:
    """Frechet distance of pictures to what they should look like."""
    return frechet_distance(pictures.mean, pictures.covariance, reference.mean, reference.covariance)


def _summed(moments: FeatureMoments, processes: Processes) -> FeatureMoments:
    return moments.summed_over(processes) if processes.count > 1 else moments
