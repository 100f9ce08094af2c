"""EQ-VAE: the objective of arXiv:2502.09509.

    L_EQ-VAE(x, tau) = L_rec(tau o x, D(tau o E(x))) + lambda_gan L_gan(D(tau o E(x))) + lambda_reg L_reg    (5)

An autoencoder that can decode a transformed latent to the transformed image has a latent space on which tau acts as it
acts on images. With tau the identity this is the standard objective (1); Equation 7 mixes the two, and
`eqvae.transforms.TransformSampler` draws which one a step takes. A discrete autoencoder quantizes after tau, and its
L_reg is the codebook's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, Quantized
from eqvae.transforms import Transform


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The terms of Equation 5 for each image, before their weights, and the pair of images that they compare."""

    reconstruction: Float[Tensor, " n"]
    """L_rec(tau o x, D(tau o E(x))): L1 + perceptual, summed over pixels as in LDM."""

    adversarial: Float[Tensor, " n"]
    """L_gan(D(tau o E(x))): minus the discriminator's logits, averaged over patches; zero without a discriminator."""

    regularization: Float[Tensor, " n"]
    """L_reg: Kullback-Leibler divergence to N(0, I), nats, summed over the latent; zero for a discrete autoencoder."""

    quantized: Quantized | None
    """What the codebook made of tau o E(x), with its own L_reg; None for a continuous autoencoder."""

    latent: Float[Tensor, "n c _ _"]
    """E(x): the posterior's mean, raw, before tau."""

    transformed: Float[Tensor, "n c h2 w2"]
    """tau o E(x), raw: what is decoded, before quantization."""

    target: Float[Tensor, "n 3 h w"]
    """tau o x."""

    decoded: Float[Tensor, "n 3 h w"]
    """D(tau o E(x)), the end of the autoencoder's graph."""

    seam: Float[Tensor, "n 3 h w"]
    """The same values, cut off: the leaf on which the first two terms depend, see `backward`."""

    fake_logits: Float[Tensor, "n 1 _ _"] | None
    """The discriminator's view of `seam`; its own loss uses them too."""

    def backward(
        self,
        last_layer: Tensor,
        *,
        adversarial_weight: float,
        regularization: Float[Tensor, ""],
        factor: float,
    ) -> Float[Tensor, ""]:
        """Send the gradient of `factor * (L_rec + lambda_gan L_gan + regularization)` through the decoder, once.

        `lambda_gan` is LDM's adaptive weight: `adversarial_weight * |grad L_rec| / |grad L_gan|`, measured at the
        decoder's last layer. Both gradients are known at the seam, so each costs one convolution's weight gradient.

        Args:
            last_layer: Weight of the decoder's last convolution.
            adversarial_weight: 0.5 in LDM; 0 leaves L_gan out.
            regularization: lambda_reg L_reg, already weighted (1e-6 times the divergence in LDM; see `step.py` for the
                codebook's).
            factor: Conditions the whole, e.g. 1 / pixels; changes no ratio.

        Returns:
            lambda_gan.
        """
        (gradient,) = torch.autograd.grad(self.reconstruction.mean(), self.seam)
        adaptive_weight = self.seam.new_zeros(())
        if adversarial_weight > 0 and self.fake_logits is not None:
            (adversarial,) = torch.autograd.grad(self.adversarial.mean(), self.seam, retain_graph=True)

            def norm_at_last_layer(upstream: Tensor) -> Tensor:
                upstream = upstream.to(self.decoded.dtype)
                return torch.autograd.grad(self.decoded, last_layer, upstream, retain_graph=True)[0].float().norm()

            ratio = norm_at_last_layer(gradient) / (norm_at_last_layer(adversarial) + 1e-4)
            adaptive_weight = adversarial_weight * ratio.clamp(0.0, 1e4)
            gradient = gradient + adaptive_weight * adversarial
        ends, upstream = [self.decoded], [(factor * gradient).to(self.decoded.dtype)]
        if regularization.requires_grad:  # not where the encoder is deterministic
            ends, upstream = [*ends, factor * regularization], [*upstream, torch.ones_like(regularization)]
        torch.autograd.backward(ends, upstream)
        return adaptive_weight


def eq_vae_loss(
    autoencoder: Autoencoder,
    x: Float[Tensor, "n 3 h w"],
    tau: Transform,
    noise: Float[Tensor, "n c h2 w2"],
    *,
    reconstruction_loss: Callable[[Tensor, Tensor], Tensor],
    discriminator: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """L_EQ-VAE(x, tau), Equation 5; with tau the identity L_VAE(x), Equation 1. Encodes once and decodes once.

    Like the released code, it transforms a sample of the posterior. Unlike it, one reconstruction and one tau serve
    the autoencoder and the discriminator.

    Args:
        autoencoder: E and D.
        x: Images in [-1, 1].
        tau: The step's transformation.
        noise: Standard normal numbers in the latent's shape.
        reconstruction_loss: L_rec(target, reconstruction) for each image.
        discriminator: Images to logits, or None for an objective without L_gan.

    Returns:
        The terms; their `backward` sends the gradients into the autoencoder.
    """
    posterior = autoencoder.encode(x)
    target, z = tau(x), tau(posterior.sample(noise))
    quantized = None
    if isinstance(autoencoder, DiscreteAutoencoder):
        quantized = autoencoder.quantize(z)
        decoded = autoencoder.decode_quantized(quantized.z_q)
    else:
        decoded = autoencoder.decode(z)

    seam = decoded.detach().float().requires_grad_()
    logits = discriminator(seam) if discriminator is not None else None
    return Objective(
        reconstruction=reconstruction_loss(target, seam),
        adversarial=-logits.float().flatten(1).mean(1) if logits is not None else seam.new_zeros(len(x)),
        regularization=posterior.kl(),
        quantized=quantized,
        latent=posterior.mode(),
        transformed=z,
        target=target,
        decoded=decoded,
        seam=seam,
        fake_logits=logits,
    )
