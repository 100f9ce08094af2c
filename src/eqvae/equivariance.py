"""EQ-VAE, the idea of arXiv:2502.09509: `L(tau o x, D(tau o E(x)))`.

An autoencoder that decodes a transformed latent to the transformed image has latents on which tau acts as on images.
All of this can be differentiated; a training loop of one's own needs three lines:

    loss = eq_vae_loss(autoencoder, x, TransformSampler(), generator).mean()
    loss.backward()
    optimizer.step()

Like the released code, it transforms a sample of the posterior, encodes once and decodes once. L_gan, the adversarial
term of Equations 1 and 5, is in `eqvae.losses.adversarial`: its adaptive weight cuts the graph at D's end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, Posterior, Quantized, check_images, uncompiled
from eqvae.errors import UserError
from eqvae.losses.reconstruction import l1_distance
from eqvae.methods.explicit import explicit_loss as explicit_loss
from eqvae.methods.protocol import Drawn
from eqvae.transforms import IDENTITY, Transform, TransformSampler

Distance = Callable[[Tensor, Tensor], Tensor]
"""L_rec(target, decoded): one value for each image."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The two images that EQ-VAE compares, and what lay between them."""

    target: Float[Tensor, "n k h w"]
    """tau o x."""

    decoded: Float[Tensor, "n k h w"]
    """D(tau o E(x)); nominally in [-1, 1]."""

    posterior: Posterior
    """E(x), before tau."""

    latents: Float[Tensor, "n c h2 w2"]
    """tau o z with z drawn from E(x), raw: what is decoded, before quantization."""

    quantized: Quantized | None
    """What the codebook made of these latents; None for a continuous autoencoder."""


def decode_transformed(
    autoencoder: Autoencoder, x: Float[Tensor, "n k h w"], tau: Transform, noise: Float[Tensor, "n c h2 w2"]
) -> Decoded:
    """Encode images, transform their latents and decode these: D(tau o E(x)) beside tau o x.

    Args:
        autoencoder: E and D; a discrete one quantizes after tau.
        x: Images, RGB in [-1, 1]; both sides divisible by the stride.
        tau: The transformation; its scales must leave whole latent cells, as `TransformSampler`'s do.
        noise: Standard normal numbers in the latent's shape; of no effect where the encoder is deterministic.

    Returns:
        Both images and what lay between, on one graph.
    """
    check_images(autoencoder, x)
    posterior = autoencoder.encode(x)
    return decode_pair(autoencoder, x, posterior, posterior.sample(noise), Drawn(image=tau, latent=tau, name=str(tau)))


def decode_pair(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n k h w"],
    posterior: Posterior,
    z: Float[Tensor, "n c h2 w2"],
    drawn: Drawn,
) -> Decoded:
    """Decode what a pair makes of latents, D(b(z)), beside what it makes of images, a(x): EQ-VAE's has a = b = tau."""
    latents = drawn.latent(z)
    if isinstance(discrete := uncompiled(autoencoder), DiscreteAutoencoder):
        quantized = discrete.quantize(latents)
        decoded = discrete.decode_quantized(quantized.z_q)
    else:
        quantized, decoded = None, autoencoder.decode(latents)
    target = drawn.image(x)
    if target.shape != decoded.shape:  # a pair of one's own
        sizes = f"{tuple(target.shape)} of the image and {tuple(decoded.shape)} of the latent"
        raise UserError(f"'{drawn.name}' of --method {drawn.branch} makes {sizes}", "Let D(b(z)) be as large as a(x)")
    return Decoded(target=target, decoded=decoded, posterior=posterior, latents=latents, quantized=quantized)


def vae_loss(
    autoencoder: Autoencoder, x: Float[Tensor, "n k h w"], noise: Float[Tensor, "n c h2 w2"], **terms: Any
) -> Float[Tensor, " n"]:
    """L_rec(x, D(E(x))) + lambda_reg L_reg: Equation 1; `terms` as those of `equivariance_loss`."""
    return equivariance_loss(autoencoder, x, IDENTITY, noise, **terms)


def equivariance_loss(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n k h w"],
    tau: Transform,
    noise: Float[Tensor, "n c h2 w2"],
    *,
    reconstruction_loss: Distance = l1_distance,
    kl_weight: float = 1e-6,
    codebook_weight: float = 1.0,
    commitment_weight: float = 0.25,
) -> Float[Tensor, " n"]:
    """L_rec(tau o x, D(tau o E(x))) + lambda_reg L_reg: Equation 5 of arXiv:2502.09509 without L_gan.

    Args:
        autoencoder: E and D.
        x: Images, RGB in [-1, 1].
        tau: The transformation; with the identity this is Equation 1.
        noise: Standard normal numbers in the latent's shape.
        reconstruction_loss: L_rec for each image, summed over its values as in LDM; `ReconstructionLoss` is perceptual.
        kl_weight: lambda_reg of a Gaussian encoder.
        codebook_weight: Per value, of the loss that pulls codes to latents.
        commitment_weight: Per value, of the loss that pulls latents to codes.

    Returns:
        One loss for each image.
    """
    pair = decode_transformed(autoencoder, x, tau, noise)
    loss = reconstruction_loss(pair.target, pair.decoded) + kl_weight * pair.posterior.kl()
    if pair.quantized is None:
        return loss
    # VQ-GAN's weights are relative to the reconstruction loss per value, which is a sum here.
    values_per_latent_value = pair.target[0].numel() / pair.latents[0].numel()
    codes = codebook_weight * pair.quantized.codebook_loss + commitment_weight * pair.quantized.commitment_loss
    return loss + values_per_latent_value * codes


def eq_vae_loss(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n k h w"],
    sampler: TransformSampler,
    generator: torch.Generator | None = None,
    **terms: Any,
) -> Float[Tensor, " n"]:
    """Equation 7: Equation 5 with tau drawn, or Equation 1 in the plain branch; `terms` as there."""
    check_images(autoencoder, x)
    draw = sampler.draw((x.shape[-2] // autoencoder.stride, x.shape[-1] // autoencoder.stride), generator)
    x = draw.before(x)
    shape = (len(x), autoencoder.latent_channels, *(side // autoencoder.stride for side in x.shape[-2:]))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=getattr(generator, "device", "cpu"))
    return equivariance_loss(autoencoder, x, draw.tau, noise.to(x), **terms)
