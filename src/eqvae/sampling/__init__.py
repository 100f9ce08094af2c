"""Sampling: pure functions from a prediction and noise to latents or tokens; guidance wraps the prediction.

predict = classifier_free_guidance(transformer, 1.5, null_label=specification.num_classes)
noise = ImageNoise(seed, indices, specification.shape, device=device)
z = ddpm(predict, noise, balanced_labels(indices, specification.num_classes), GaussianDiffusion(), num_steps=250)

noise = TokenNoise(seed, indices, (specification.height, specification.width), device=device)
tokens = confidence(transformer, noise, labels, specification, TokenDecoding(num_steps=8, guidance_scale=3.0))
"""

from eqvae.sampling.diffusion import ddim, ddpm
from eqvae.sampling.guidance import autoguidance, classifier_free_guidance
from eqvae.sampling.labels import balanced_labels, listed_labels, random_labels
from eqvae.sampling.noise import ImageNoise
from eqvae.sampling.ode import dopri5, euler, heun
from eqvae.sampling.sde import DiffusionForm, LastStep, euler_maruyama
from eqvae.sampling.step import Callback, SamplingStep
from eqvae.sampling.token_noise import TokenNoise
from eqvae.sampling.tokens import (
    GuidanceSchedule,
    TokenCallback,
    TokenDecoding,
    TokenStep,
    classifier_free_token_guidance,
    confidence,
    halton,
)

__all__ = [
    "Callback",
    "DiffusionForm",
    "GuidanceSchedule",
    "ImageNoise",
    "LastStep",
    "SamplingStep",
    "TokenCallback",
    "TokenDecoding",
    "TokenNoise",
    "TokenStep",
    "autoguidance",
    "balanced_labels",
    "classifier_free_guidance",
    "classifier_free_token_guidance",
    "confidence",
    "ddim",
    "ddpm",
    "dopri5",
    "euler",
    "euler_maruyama",
    "halton",
    "heun",
    "listed_labels",
    "random_labels",
]
