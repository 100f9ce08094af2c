"""What the runs of a plan will cost, from their configurations alone: operations, hours of a named device, disk.

Operations are what PyTorch counts on the meta device for the real networks: convolutions, matrix products, attention, a
multiplication and an addition as two. A training step is three forward passes. Left out: optimizers, discriminator (1%
of a step), measures that look at no image, decoding of files; and on disk what is no tensor, and an evaluation's
pictures.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import timm
import torch
import torchvision

from eqvae.autoencoders import build_autoencoder
from eqvae.autoencoders.presets import UNTRAINED
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.generators.families import RepaSit
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.recipes import Recipe
from eqvae.images.sizes import square_px
from eqvae.methods import Mixture
from eqvae.methods.transform_config import TransformConfig
from eqvae.networks.features import INCEPTION
from eqvae.networks.pretrained import EFFICIENTNET_LITE0
from eqvae.networks.teachers import DINOV2_B
from eqvae.paper.plan import Plan, PlannedRun
from eqvae.paper.setting import Setting
from eqvae.runs.sample import SampleConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.device import count_flops
from eqvae.runtime.run_folder import flat
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.transforms import Compose, Scale, Transform, TransformSampler

# fmt: off
DEVICES: Mapping[str, tuple[float, float, float]] = {
    # name          bf16      fp32      share
    "a100-80gb":   (312e12,   19.5e12,  0.35),
    "h100":        (989.4e12, 66.9e12,  0.30),
    "h200":        (989.4e12, 66.9e12,  0.30),
    "rtx-4090":    (165.2e12, 82.6e12,  0.35),
    "cpu":         (1.37e12,  0.46e12,  0.12),
}
# fmt: on
"""Peaks of dense matrix products in FLOP/s (fp32 without TF32), and the share of them that a run is taken to reach.
GPUs' peaks are NVIDIA's; their shares are assumptions, usual for transformers of published sizes in eager mode: small
networks reach far less. `cpu` is two cores of an Intel Xeon with AMX: its peak is twice the 684 GFLOP/s that a bf16
matrix product reached on one (docs/results/benchmarks/train_generator.json), its share lies between fine-tuning
tiny-kl-f2 at 32 px (0.04) and DiT-S/2 (0.36)."""

META = torch.device("meta")
_FEATURES = {INCEPTION: (299, 2048), EFFICIENTNET_LITE0: (224, 1280)}
"""Side to which images are resized, px, and channels."""
_TEACHERS = {DINOV2_B: (14, 768), EFFICIENTNET_LITE0: (16, 112)}
"""Pixels per token, and channels."""
_TRANSFORMED = 3 + 1 / 16 + 1 / 4 + 9 / 16
"""Area of an evaluation's six transformed images: three rotations, scales of 1/4, 1/2 and 3/4."""
_NUM_SHEET_IMAGES, _NUM_DRAWS = 100, 300


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run, or of several together."""

    bf16_flops: float = 0.0

    fp32_flops: float = 0.0

    disk_bytes: int = 0
    """What lies there at the end."""

    def __add__(self, other: "Cost") -> "Cost":
        """Put two together."""
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def hours(self, device: str) -> float:
        """Take so long on one device of `DEVICES`."""
        bf16_peak, fp32_peak, share = DEVICES[device]
        return (self.bf16_flops / bf16_peak + self.fp32_flops / fp32_peak) / share / 3600

    def show(self, device: str) -> tuple[str, str, str]:
        """Print operations, hours, disk."""
        power = min(int(math.log10(max(self.disk_bytes, 1))) // 3, 4)
        size = f"{self.disk_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
        return f"{self.bf16_flops + self.fp32_flops:.2e}", f"{self.hours(device):.3g}", size


def describe_plan(plan: Plan, items: Mapping[str, Sequence[PlannedRun]], setting: Setting, device: str) -> str:
    """List a plan's runs with their state, the items that share them and their cost, and sums of what is left."""
    closures = {item: {run.name for run in Plan.of(runs).runs} for item, runs in items.items()}
    rows, left, total = [("run", "state", "for", "FLOPs", f"{device} hours", "disk")], Cost(), Cost()
    for run in plan.runs:
        state = "done" if run.is_finished else "begun" if run.has_begun else "to do"
        wanted_by = ",".join(item for item, names in closures.items() if run.name in names)
        cost = estimate(run, setting)
        total += cost
        left += Cost() if run.is_finished else estimate(_what_is_left(run), setting)
        rows.append((f"{run.command} {run.name}", state, wanted_by, *cost.show(device)))
    rows.append((f"{len(plan.unfinished)} runs to do", "", "", *left.show(device)))
    rows.append((f"all {len(plan.runs)} runs", "", "", *total.show(device)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layout = "  ".join(f"{{:{'<' if place < 3 else '>'}{width}}}" for place, width in enumerate(widths))
    return "\n".join(layout.format(*row).rstrip() for row in rows)


def _what_is_left(run: PlannedRun) -> PlannedRun:
    """A training that is lengthened goes on from its end."""
    if not isinstance(run.config, TrainConfig) or not run.num_steps_done:
        return run
    return replace(run, config=replace(run.config, max_steps=run.config.max_steps - run.num_steps_done))


def estimate(run: PlannedRun, setting: Setting) -> Cost:
    """Estimate one run."""
    estimates: Mapping[str, Callable[[PlannedRun, Any, Setting], Cost]] = {
        "finetune": _finetune, "equalize": _finetune, "evaluate": _evaluate, "reference": _reference,
        "encode": _encode, "train": _train, "sample": _sample, "score": _score,
    }  # fmt: skip
    config: Any = run.config
    return estimates[run.command](run, config.resolved() if hasattr(config, "resolved") else config, setting)


def _finetune(run: PlannedRun, config: Any, setting: Setting) -> Cost:
    """Steps, and validations of E(x), D(E(x)) and E(tau x); a checkpoint with average and moments, and the export.

    What is frozen costs no gradients of weights, and a frozen encoder no backward pass at all. A method's own networks
    are left out.
    """
    training, perceptual = config.training, config.training.reconstruction.perceptual
    encode, decode = coding_flops(run.architecture, config.image_size)
    seen = 0.0 if perceptual == "none" else network_flops(perceptual, config.image_size)
    num_encoded, area = _mean_areas(training.mixture(), config.image_size // on_meta(run.architecture).stride)
    encoder_passes, decoder_passes = _passes(training)
    step = encoder_passes * num_encoded * encode + area * (decoder_passes * decode + 3 * seen)
    polish = encode + 3 * (decode + seen)
    num_validations = 2 + (training.total_steps - 1) // config.validate_every  # of the base, between, at the end
    flops = training.batch_size * (training.max_steps * step + training.polish_steps * polish)
    flops += config.num_statistics_images * encode
    flops += num_validations * config.num_validation_images * ((1 + _TRANSFORMED) * encode + decode)
    num_copies = 5 if flat(config)["ema_decay"] else 4
    return _computing(training, flops) + Cost(disk_bytes=4 * num_copies * on_meta(run.architecture).num_parameters())


def _mean_areas(mixture: Mixture, side: int) -> tuple[float, float]:
    """How many images' worth is encoded, and how much of one is decoded, for each image."""
    area, num_encoded = 1.0, 1.0
    for share, pair in mixture.pairs:
        area -= share * (1.0 - _mean_area(pair.sampler(), side) if isinstance(pair, TransformConfig) else 0.0)
    for _, term in mixture.terms:
        if isinstance(term, TransformConfig):  # the equivariance branch encodes tau x beside x
            num_encoded += _mean_area(term.sampler(), side) - 1.0 + term.sampler().equivariance_probability
    return num_encoded, area


def _passes(training: AutoencoderTraining) -> tuple[int, int]:
    """How often a step goes through encoder and decoder: forward, gradients of inputs, gradients of weights."""
    whole = 2 if training.lora_rank else 3
    return (1 if training.freeze_encoder else whole), (2 if training.freeze_decoder else whole)


def _evaluate(run: PlannedRun, config: Any, setting: Setting) -> Cost:
    """x, tau x, and what lies between latents: encoded, decoded, and seen by the features."""
    num_images = config.num_images or setting.num_validation_images
    encode, decode = coding_flops(run.architecture, config.image_size)
    measured = 15.0 * network_flops(config.features)  # x and what lies between latents, and pairs of the others
    measured += 2 * network_flops("lpips", config.image_size) if config.lpips else 0.0
    coded = (1 + _TRANSFORMED) * encode + (2 + _TRANSFORMED) * decode
    return _computing(config, num_images * coded) + Cost(fp32_flops=num_images * measured)


def _reference(run: PlannedRun, config: Any, setting: Setting) -> Cost:
    """Features of all images, and their covariance in fp64."""
    num_images, (_, channels) = setting.num_reference_images, _FEATURES[config.features]
    cost = _computing(config, num_images * network_flops(config.features))
    return cost + Cost(disk_bytes=4 * channels * num_images + 8 * channels**2)


def _encode(run: PlannedRun, config: Any, setting: Setting) -> Cost:
    """Of each image and its mirror image two moments, or tokens, of two bytes."""
    num_views = (config.num_images or setting.num_images) * (2 if config.mirror else 1)
    autoencoder = on_meta(run.architecture)
    numbers = 1 if isinstance(autoencoder, DiscreteAutoencoder) else 2 * autoencoder.latent_channels
    num_bytes = 2 * num_views * numbers * (config.image_size // autoencoder.stride) ** 2
    encode, _ = coding_flops(run.architecture, config.image_size)
    return _computing(config, num_views * encode) + Cost(disk_bytes=num_bytes)


def _train(run: PlannedRun, config: Any, setting: Setting) -> Cost:
    """Steps, REPA's teacher, samples while training; a checkpoint with average and moments, and two exports."""
    recipe, latents = config.find_recipe(), _latents(run, setting)
    step, num_parameters = generator_size(recipe, latents, in_training=True)
    num_seen, num_watches = config.max_steps * config.batch_size, -(-config.max_steps // config.sample_every)
    cost = _computing(config, 3 * num_seen * step) + Cost(disk_bytes=6 * 4 * num_parameters)
    if isinstance(recipe, RepaSit):
        side = setting.tokens_per_side * _TEACHERS[recipe.repa.teacher][0]
        num_taught = 2 * (setting.encoding.num_images or setting.num_images) if recipe.repa.cache_teacher else num_seen
        cost += Cost(bf16_flops=num_taught * network_flops(recipe.repa.teacher, side))
    cost += Cost(fp32_flops=num_watches * config.num_watch_samples * network_flops(config.features))
    num_drawn = num_watches * (config.num_watch_samples + _NUM_SHEET_IMAGES)
    per_image = _calls(config.watch_sampler, config.watch_steps) * generator_size(recipe, latents)[0]
    return cost + _drawing(run, setting, config, num_drawn, per_image)


def _sample(run: PlannedRun, config: Any, setting: Setting) -> Cost:
    """Guided steps count twice; images lie there uncompressed, beside their labels."""
    (training,) = (need.config for need in run.needs if isinstance(need.config, TrainConfig))
    guided_share = config.guidance_high - config.guidance_low if config.guidance_scale != 1.0 else 0.0
    forward, _ = generator_size(training.find_recipe(), _latents(run, setting))
    per_image = _calls(config.sampler, config.num_steps) * (1 + guided_share) * forward
    num_bytes = config.num_samples * (3 * square_px(setting.encoding.image_size) ** 2 + 8)
    return _drawing(run, setting, config, config.num_samples, per_image) + Cost(disk_bytes=num_bytes)


def _score(run: PlannedRun, config: Any, setting: Setting) -> Cost:
    """Features of the samples; the reference's are there."""
    (sampling,) = (need.config for need in run.needs if isinstance(need.config, SampleConfig))
    return _computing(config, (config.num_images or sampling.num_samples) * network_flops(config.features))


def _calls(sampler: str | None, num_steps: int) -> int:
    """How often a sampler asks the network: twice in each of Heun's steps but the last."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def _computing(config: Any, flops: float) -> Cost:
    return Cost(bf16_flops=flops) if config.precision == "bf16" else Cost(fp32_flops=flops)


def _drawing(run: PlannedRun, setting: Setting, config: Any, num_images: int, per_image: float) -> Cost:
    """Sampler, and decoder, which computes in fp32."""
    _, decode = coding_flops(run.architecture, setting.encoding.image_size)
    return _computing(config, num_images * per_image) + Cost(fp32_flops=num_images * decode)


@lru_cache
def _mean_area(sampler: TransformSampler, side: int) -> float:
    """Compute how large tau x is in the mean over draws."""

    def area_of(tau: Transform) -> float:
        if isinstance(tau, Compose):
            return math.prod(map(area_of, tau.parts), start=1.0)
        return float(tau.vertical * tau.horizontal) if isinstance(tau, Scale) else 1.0

    generator = generator_for(0)
    return sum(area_of(sampler.draw((side, side), generator).tau) for _ in range(_NUM_DRAWS)) / _NUM_DRAWS


@lru_cache
def on_meta(architecture: str | Autoencoder) -> Autoencoder:
    """Build an autoencoder without its weights."""
    if isinstance(architecture, Autoencoder):
        return copy.deepcopy(architecture).to(META)
    with META:
        return build_autoencoder(architecture.removeprefix(UNTRAINED), seed=0)


@lru_cache
def coding_flops(architecture: str | Autoencoder, image_size_px: int) -> tuple[float, float]:
    """Count encoder and decoder, for one image."""
    autoencoder, x = on_meta(architecture), torch.empty(1, 3, image_size_px, image_size_px, device=META)
    with torch.no_grad():
        z = autoencoder.encode(x).mode()
        return float(count_flops(autoencoder.encode, x)), float(count_flops(autoencoder.decode, z))


@lru_cache
def network_flops(name: str, image_size_px: int | None = None) -> float:
    """Count a frozen network that sees images, for one image; of features, at the size to which they resize it."""
    side = image_size_px or _FEATURES[name][0]
    with META, torch.no_grad():
        if name == "lpips":
            network: Any = torchvision.models.vgg16(weights=None).features
        elif name == INCEPTION:
            network = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
        else:
            sized: dict[str, Any] = {"img_size": side} if name.startswith("vit") else {}
            network = timm.create_model(name.replace("-", "_"), **sized)
        return float(count_flops(network.eval(), torch.empty(1, 3, side, side)))


def _latents(run: PlannedRun, setting: Setting) -> LatentSpecification:
    autoencoder = on_meta(run.architecture)
    side = square_px(setting.encoding.image_size) // autoencoder.stride
    channels = autoencoder.latent_channels
    if isinstance(autoencoder, DiscreteAutoencoder):
        channels = autoencoder.codebook_size
    return LatentSpecification(channels=channels, height=side, width=side, num_classes=setting.num_classes)


@lru_cache
def generator_size(recipe: Recipe, latents: LatentSpecification, *, in_training: bool = False) -> tuple[float, int]:
    """Count a generator's forward pass for one image, in training with REPA's projector, and its parameters."""
    config: Any = recipe.transformer(latents)
    depth: tuple[int, ...] = ()
    if in_training and isinstance(recipe, RepaSit):
        config, depth = replace(config, teacher_channels=_TEACHERS[recipe.repa.teacher][1]), (recipe.repa_depth,)
    with META:
        network = config.build()
        return float(count_flops(network, *config.example(), *depth)), network.num_parameters()
