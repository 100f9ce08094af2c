"""What a planned run will cost: operations, hours of a named device, disk. From configurations alone.

No weights, no data and no cache are read. Operations are those of `flop_counts.py`; what no network does (optimizers,
losses, reading images, Frechet distances) is left out. Disk is what lies there at the end; see `disk_sizes.py`.
"""

import math
from dataclasses import dataclass, replace
from typing import cast

from eqvae.autoencoders.protocol import DiscreteAutoencoder
from eqvae.errors import UserError, nearest_name
from eqvae.generators.families import BackboneConfig, Recipe, RepaSit, find_recipe
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import TransformerConfig
from eqvae.metrics.equivariance import evaluation_transforms
from eqvae.networks.features import INCEPTION
from eqvae.networks.pretrained import EFFICIENTNET_LITE0, inception_is_cached, lpips_is_cached
from eqvae.paper import disk_sizes, flop_counts
from eqvae.paper.devices import DEVICES, Device
from eqvae.paper.finetuning_flops import finetuning_flops
from eqvae.paper.flop_counts import Architecture, area_of, backbone_flops, coding_flops, feature_flops
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.sample import SampleConfig
from eqvae.runs.score import ScoreConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import Precision
from eqvae.sampling.draw import sheet_indices

__all__ = [
    "DEVICES",
    "Cost",
    "Device",
    "Sizes",
    "encode_cost",
    "evaluate_cost",
    "finetune_cost",
    "reference_cost",
    "sample_cost",
    "score_cost",
    "train_cost",
]

_DOPRI5_CALLS = 120
"""Of the network, per image: an assumption, since the solver chooses its steps."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run, or of several together."""

    flops: float = 0.0
    """A multiplication and an addition are two."""

    device_hours: float = 0.0
    """Of one device."""

    disk_bytes: int = 0
    """What lies there at the end."""

    def __add__(self, other: "Cost") -> "Cost":
        """Put two runs together."""
        return Cost(
            flops=self.flops + other.flops,
            device_hours=self.device_hours + other.device_hours,
            disk_bytes=self.disk_bytes + other.disk_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What no configuration of a stage says."""

    autoencoder: Architecture
    """A preset's name (`untrained:` before it is ignored), or any loaded autoencoder of this architecture."""

    num_images: int
    """Of the generator's data, where `EncodeConfig` does not cut them."""

    image_size_px: int
    """Side of the images that the generator models; fine-tuning, evaluation and encoding say theirs themselves."""

    num_classes: int
    """Of the generator's data; 0 without labels."""

    num_evaluation_images: int = 50_000
    """Where `EvaluateConfig` does not cut them; ImageNet's validation set has 50,000."""

    num_samples: int = 50_000
    """Of the sample set, where `ScoreConfig` does not cut it."""

    num_reference_images: int = 0
    """Images of the reference that `eqvae score` or a training run looks at; 0 for saved statistics."""


def finetune_cost(config: FinetuneConfig, sizes: Sizes, device: str) -> Cost:
    """Estimate a fine-tuning run: steps with all their networks, validations, checkpoint, export."""
    config = config.resolved()
    training = config.training
    step = finetuning_flops(config, sizes.autoencoder)
    coding = coding_flops(sizes.autoencoder, config.image_size)
    num_warming_up = training.adversarial.discriminator_warmup_steps or 0
    num_validations = 2 + (training.max_steps - 1) // (config.validate_every or 1)  # of the base, between, at the end
    num_learning = training.max_steps - num_warming_up
    flops = training.batch_size * (num_learning * step.training + num_warming_up * step.warming_up)
    flops += num_validations * config.num_validation_images * _evaluation_flops(coding)
    flops += config.num_statistics_images * coding.encode
    num_bytes = disk_sizes.finetuning_bytes(config, sizes.autoencoder)
    return _computing(flops, training.precision, device) + _storing(num_bytes)


def encode_cost(config: EncodeConfig, sizes: Sizes, device: str) -> Cost:
    """Estimate a latent cache."""
    num_images = config.num_images or sizes.num_images
    num_views = 2 if config.mirror else 1
    coding = coding_flops(sizes.autoencoder, config.image_size)
    flops = num_images * num_views * (coding.encode + coding.tokenize)
    num_bytes = disk_sizes.cache_bytes(config, sizes.autoencoder, num_images, has_labels=sizes.num_classes > 0)
    return _computing(flops, config.precision, device) + _storing(num_bytes)


def train_cost(config: TrainConfig, sizes: Sizes, device: str) -> Cost:
    """Estimate a generator's training: three forward passes per image and step, REPA's teacher, the watch's samples.

    The file of a cached teacher lies beside the latents and is made once; here each run counts it.
    """
    config = config.resolved()
    recipe = config.find_recipe()
    transformer = _backbone(recipe, sizes)
    num_seen, num_watches = config.max_steps * config.batch_size, -(-config.max_steps // (config.sample_every or 1))
    cost, projector_depth = Cost(), None
    if isinstance(recipe, RepaSit):
        teacher = flop_counts.teacher_flops(recipe.repa.teacher, transformer.grid)
        transformer = replace(cast(TransformerConfig, transformer), teacher_channels=teacher.channels)
        projector_depth = recipe.repa_depth
        num_taught = 2 * sizes.num_images if recipe.repa.cache_teacher else num_seen
        num_numbers = num_taught * math.prod(transformer.grid) * teacher.channels
        cost += _computing(num_taught * teacher.per_image, "bf16", device)
        cost += _storing(2 * num_numbers if recipe.repa.cache_teacher else 0)
    passes = 4.0 if config.gradient_checkpointing else 3.0
    cost += _computing(num_seen * passes * backbone_flops(transformer, projector_depth), config.precision, device)
    cost += _storing(disk_sizes.training_bytes(transformer, posthoc_ema=config.posthoc_ema, num_watches=num_watches))
    num_drawn = len(sheet_indices(config.num_watch_samples, sizes.num_classes))
    if config.reference is not None:
        features = feature_flops(config.features).per_image
        num_drawn += config.num_watch_samples
        num_measured = num_watches * config.num_watch_samples + sizes.num_reference_images
        cost += _computing(num_measured * features, "fp32", device)
    sampling = SampleConfig(run="", out=config.out, num_steps=config.watch_steps, precision=config.precision)
    return cost + _drawing(sampling, recipe, transformer, sizes, num_watches * num_drawn, device)


def sample_cost(config: SampleConfig, recipe: str, sizes: Sizes, device: str) -> Cost:
    """Estimate a sample set; guidance doubles the transformer's part where it is on.

    A `weak_run` is taken to be as large as the generator.
    """
    config.check()
    parsed = find_recipe(recipe)
    transformer = _backbone(parsed, sizes)
    has_labels = sizes.num_classes > 0
    num_bytes = disk_sizes.sample_set_bytes(config.num_samples, sizes.image_size_px, has_labels=has_labels)
    drawing = _drawing(config, parsed, transformer, sizes, config.num_samples, device)
    return drawing + _storing(num_bytes)


def evaluate_cost(config: EvaluateConfig, sizes: Sizes, device: str) -> Cost:
    """Estimate the evaluation of an autoencoder; nearest neighbours among latents are left out.

    LPIPS and Inception are counted where `eqvae evaluate` would use them on this machine.
    """
    num_images = config.num_images or sizes.num_evaluation_images
    coding = coding_flops(sizes.autoencoder, config.image_size)
    features = feature_flops(config.features or (INCEPTION if inception_is_cached() else EFFICIENTNET_LITE0)).per_image
    areas = [area_of(tau) for tau in evaluation_transforms().values()]
    coded, decode = _evaluation_flops(coding), coding.tokenize + coding.decode
    measured = 2 * features  # of images and reconstructions
    if config.lpips or (config.lpips is None and lpips_is_cached()):
        measured += 2 * flop_counts.perceptual_flops("lpips", config.image_size)
    if config.all:  # the transformed, and what lies between latents
        coded += (sum(areas) + 1) * decode
        measured += (2 * len(areas) + 1) * features
    num_bytes = disk_sizes.pictures_bytes(config.num_pictures, config.image_size, sizes.autoencoder)
    return (
        _computing(num_images * coded, config.precision, device)
        + _computing(num_images * measured, "fp32", device)
        + _storing(num_bytes)
    )


def score_cost(config: ScoreConfig, sizes: Sizes, device: str) -> Cost:
    """Estimate a score: features, and for precision and recall all distances among and between both sets."""
    features = feature_flops(config.features)
    num_samples = config.num_images or sizes.num_samples
    num_reference = min(config.num_reference or sizes.num_reference_images, sizes.num_reference_images)
    num_rows = num_reference or num_samples  # saved statistics hold features: of as many images, it is assumed
    pairs = num_samples**2 + num_rows**2 + num_samples * num_rows
    saved = disk_sizes.statistics_bytes(config.features, num_rows) if config.save_reference is not None else 0
    return (
        _computing((num_samples + num_reference) * features.per_image, config.precision, device)
        + _computing(2.0 * features.channels * pairs, "fp32", device)
        + _storing(saved)
    )


def reference_cost(features: str, num_images: int, device: str, *, precision: Precision = "fp32") -> Cost:
    """Estimate the statistics of a reference, computed once and saved with their features."""
    flops = num_images * feature_flops(features).per_image
    return _computing(flops, precision, device) + _storing(disk_sizes.statistics_bytes(features, num_images))


def _computing(flops: float, precision: Precision, device: str) -> Cost:
    if device not in DEVICES:
        raise UserError(f"There are no figures of a device '{device}'", nearest_name(device, DEVICES))
    found = DEVICES[device]
    peak = found.bf16_flops_per_sec if precision == "bf16" else found.fp32_flops_per_sec
    hours = flops / (peak * found.reached_share) / 3600
    return Cost(flops=float(flops), device_hours=hours)


def _storing(num_bytes: int) -> Cost:
    return Cost(disk_bytes=num_bytes)


def _evaluation_flops(coding: flop_counts.CodingFlops) -> float:
    """Of one image: E(x), D(E(x)), and E(tau o x) for each transformation of Section C.3."""
    transformed = sum(area_of(tau) for tau in evaluation_transforms().values())
    return (1 + transformed) * (coding.encode + coding.tokenize) + coding.decode


def _drawing(
    config: SampleConfig,
    recipe: Recipe,
    transformer: BackboneConfig,
    sizes: Sizes,
    num_images: int,
    device: str,
) -> Cost:
    """Sampler and decoder; the latter always computes in fp32."""
    decode = coding_flops(sizes.autoencoder, sizes.image_size_px).decode
    calls = _num_token_calls(config) if recipe.models == "tokens" else _num_calls(config)
    drawing = _computing(num_images * calls * backbone_flops(transformer), config.precision, device)
    return drawing + _computing(num_images * decode, "fp32", device)


def _num_calls(config: SampleConfig) -> float:
    """Forward passes per image, those of guidance among them; times are taken to be spaced evenly."""
    num_steps = config.num_steps or 250
    calls = {"heun": 2 * num_steps - 1, "dopri5": _DOPRI5_CALLS}.get(config.sampler or "", num_steps)
    guided_share = config.guidance_high - config.guidance_low if config.guidance_scale != 1.0 else 0.0
    return calls * (1.0 + guided_share)


def _num_token_calls(config: SampleConfig) -> float:
    """The same for MaskGIT, whose linear schedule leaves the first step unguided."""
    is_halton = config.sampler == "halton"
    num_steps = config.num_steps or (32 if is_halton else 8)
    if config.guidance_scale == 1.0:
        return float(num_steps)
    is_constant = (config.guidance_schedule or ("constant" if is_halton else "linear")) == "constant"
    return float(2 * num_steps if is_constant or num_steps == 1 else 2 * num_steps - 1)


def _backbone(recipe: Recipe, sizes: Sizes) -> BackboneConfig:
    """Describe a generator of the autoencoder's latents or tokens."""
    autoencoder = flop_counts.meta_autoencoder(sizes.autoencoder)
    is_discrete = isinstance(autoencoder, DiscreteAutoencoder)
    if is_discrete != (recipe.models == "tokens"):
        raise UserError(f"'{recipe}' does not model what '{autoencoder.name}' makes", "MaskGIT models tokens")
    side = sizes.image_size_px // autoencoder.stride
    channels = (
        autoencoder.codebook_size if isinstance(autoencoder, DiscreteAutoencoder) else autoencoder.latent_channels
    )
    return recipe.transformer(
        LatentSpecification(channels=channels, height=side, width=side, num_classes=sizes.num_classes)
    )
