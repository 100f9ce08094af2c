"""Operations of a fine-tuning step, counted on PyTorch's meta device."""

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from eqvae.equivariance import decode_transformed
from eqvae.losses.adversarial import Seam, build_discriminator, hinge_loss
from eqvae.losses.reconstruction import l1_distance
from eqvae.paper.flop_counts import META, Architecture, area_of, meta_autoencoder, perceptual_flops
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.throughput import count_flops
from eqvae.transforms import IDENTITY, TransformSampler

_NUM_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class FinetuningFlops:
    """Of a fine-tuning step, for one image, averaged over tau."""

    training: float
    """Forward and backward."""

    warming_up: float
    """While only the discriminator learns."""


def finetuning_flops(config: FinetuneConfig, architecture: Architecture) -> FinetuningFlops:
    """Count a step of the very objective that `eqvae finetune` minimizes, forward and backward.

    A scaled picture counts by its area, averaged over draws of tau; attention, which grows faster, is taken along.
    """
    training = config.training
    side = config.image_size // meta_autoencoder(architecture).stride
    areas = _mean_areas(training.transform.sampler(), side)
    adversarial = training.adversarial.adversarial_weight > 0
    compared = training.reconstruction
    perceptual = perceptual_flops(compared.perceptual, config.image_size) if compared.perceptual_weight > 0 else 0.0
    implicit = training.objective == "implicit"

    def mean(*, warming_up: bool) -> float:
        frozen = warming_up or training.freeze_encoder
        encoder = _encoder_flops(architecture, config.image_size, frozen)
        whole = _objective_flops(architecture, config.image_size, adversarial, frozen, warming_up)
        # Of target and reconstruction; the gradient of the latter costs as much again.
        after_encoder = whole - encoder + perceptual * (2.0 if warming_up else 3.0)
        if implicit:
            return areas.encoded * (encoder + areas.transformed * after_encoder)
        is_constant = frozen or training.objective == "explicit-stop-gradient"
        again = areas.equivariance * _encoder_flops(architecture, config.image_size, is_constant)
        return areas.encoded * (encoder + after_encoder) + again

    return FinetuningFlops(training=mean(warming_up=False), warming_up=mean(warming_up=True) if adversarial else 0.0)


@dataclass(frozen=True, kw_only=True)
class _Areas:
    """Means over the steps of a run."""

    encoded: float
    """Of what is encoded: below 1 where the plain branch shrinks images."""

    transformed: float
    """Of tau o x, relative to that."""

    equivariance: float
    """Of tau o x in the equivariance branch, times that branch's probability."""


def _mean_areas(sampler: TransformSampler, side: int) -> _Areas:
    share = sampler.equivariance_probability
    plain = _mean_area(replace(sampler, equivariance_probability=0.0), side)
    equivariance = _mean_area(replace(sampler, equivariance_probability=1.0), side)
    encoded = (1.0 - share) * plain + share
    return _Areas(
        encoded=encoded,
        transformed=((1.0 - share) * plain + share * equivariance) / encoded,
        equivariance=share * equivariance,
    )


@lru_cache(maxsize=64)
def _mean_area(sampler: TransformSampler, side: int) -> float:
    """Of tau o before(x), over draws of a single branch."""
    if sampler.smallest_side(side) == side:
        return 1.0
    generator = generator_for(0)
    draws = [sampler.draw((side, side), generator) for _ in range(_NUM_DRAWS)]
    return sum(area_of(draw.before) * area_of(draw.tau) for draw in draws) / len(draws)


@lru_cache(maxsize=64)
def _encoder_flops(architecture: Architecture, image_size_px: int, frozen: bool) -> float:
    autoencoder = copy.deepcopy(meta_autoencoder(architecture))
    x = torch.empty(1, 3, image_size_px, image_size_px, device=META)

    def run() -> None:
        posterior = autoencoder.encode(x)
        if not frozen:
            (posterior.mean.sum() + posterior.kl().sum()).backward()

    return float(count_flops(run))


@lru_cache(maxsize=64)
def _objective_flops(
    architecture: Architecture, image_size_px: int, adversarial: bool, frozen_encoder: bool, warming_up: bool
) -> float:
    """Count Equation 1 without its perceptual distance, as `finetune.step` computes it."""
    autoencoder = copy.deepcopy(meta_autoencoder(architecture))
    autoencoder.requires_grad_(not warming_up)
    for parameter in autoencoder.encoder_parameters() if frozen_encoder else ():
        parameter.requires_grad_(False)
    discriminator = build_discriminator(0).to(META) if adversarial else None
    side = image_size_px // autoencoder.stride
    x = torch.empty(1, 3, image_size_px, image_size_px, device=META)
    noise = torch.empty(1, autoencoder.latent_channels, side, side, device=META)

    def judge(image: Tensor) -> Tensor:
        assert discriminator is not None
        return discriminator(1.0 * image)  # the counter can't follow `autograd.grad` to a leaf that a module was given

    def run() -> None:
        pair = decode_transformed(autoencoder, x, IDENTITY, noise)
        seam = Seam.cut(pair.decoded)
        logits = judge(seam.image) if adversarial else None
        if pair.decoded.requires_grad:
            seam.backward(
                autoencoder.last_layer.weight,
                reconstruction=l1_distance(pair.target, seam.image).mean(),
                adversarial=-logits.mean() if logits is not None else None,
                adversarial_weight=float(adversarial),
                regularization=pair.posterior.kl().mean(),
                factor=1.0,
            )
        if discriminator is not None and logits is not None:
            hinge_loss(judge(pair.target), logits).backward(inputs=list(discriminator.parameters()))

    return float(count_flops(run))
