"""Sampling: pure functions from a prediction and noise to latents; guidance wraps the prediction.

predict = classifier_free_guidance(transformer, 1.5, null_label=specification.num_classes)
noise = ImageNoise(seed, indices, specification.shape, device=device)
z = ddpm(predict, noise, balanced_labels(indices, specification.num_classes), GaussianDiffusion(), num_steps=250)
"""

from eqvae.sampling.diffusion import ddim, ddpm
from eqvae.sampling.guidance import autoguidance, classifier_free_guidance
from eqvae.sampling.labels import balanced_labels, listed_labels, random_labels
from eqvae.sampling.noise import ImageNoise
from eqvae.sampling.ode import dopri5, euler, heun
from eqvae.sampling.sde import DiffusionForm, LastStep, euler_maruyama
from eqvae.sampling.step import Callback, SamplingStep

__all__ = [
    "Callback",
    "DiffusionForm",
    "ImageNoise",
    "LastStep",
    "SamplingStep",
    "autoguidance",
    "balanced_labels",
    "classifier_free_guidance",
    "ddim",
    "ddpm",
    "dopri5",
    "euler",
    "euler_maruyama",
    "heun",
    "listed_labels",
    "random_labels",
]
