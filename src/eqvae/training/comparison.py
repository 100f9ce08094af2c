"""One comparison of a training step, L(a(x), D(b(z))), and the terms beside it: values, and gradients at the seams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.autoencoders.protocol import Autoencoder, Posterior
from eqvae.equivariance import Decoded, decode_pair
from eqvae.losses.adversarial import AdversarialConfig, LogitAverages, Seam, hinge_loss, r1_penalty
from eqvae.losses.codebook import Codes
from eqvae.losses.discriminators import Discriminator
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.methods import Drawn
from eqvae.runtime.processes import Processes
from eqvae.training.autoencoder_config import AutoencoderTraining


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """L(a(x), D(b(z))), cut open after the decoder."""

    weight: float
    pair: Decoded
    seam: Seam
    image: Float[Tensor, "n k h w"]
    """What is compared with the target: the seam's, but the target's own where a mask says that nothing counts."""
    reconstruction: Float[Tensor, ""]
    adversarial: Float[Tensor, ""] | None
    discriminator_loss: Float[Tensor, ""]
    judged: dict[str, Float[Tensor, ""]]
    """The discriminator's hinge loss, and what regularizes it before its weight, by the journal's names."""

    @classmethod
    def make(
        cls,
        weight: float,
        drawn: Drawn,
        encoded: tuple[Autoencoder, Float[Tensor, "n k h w"], Posterior, Float[Tensor, "n c h2 w2"]],
        *,
        num_values: int,
        config: AutoencoderTraining,
        reconstruction_loss: ReconstructionLoss,
        discriminator: Discriminator | None,
        averages: LogitAverages | None,
    ) -> "Comparison":
        """Decode and compare."""
        pair = decode_pair(*encoded, drawn)
        seam = Seam.cut(pair.decoded)
        image = seam.image if drawn.mask is None else torch.where(drawn.mask > 0.5, seam.image, pair.target.float())
        logits = discriminator(image) if discriminator is not None else None
        per_image = reconstruction_loss(pair.target, image)
        if config.reconstruction.resolution_weighting == "equal":
            per_image = per_image * (num_values / pair.target[0].numel())
        adversarial = -logits.float().flatten(1).mean(1).mean() if logits is not None else None
        discriminator_loss = seam.image.new_zeros(())
        judged = {"discriminator": discriminator_loss}
        if discriminator is not None and logits is not None:
            discriminator_loss, judged = _judge(discriminator, pair.target, logits, config.adversarial, averages)
        return cls(
            weight=weight,
            pair=pair,
            seam=seam,
            image=image,
            reconstruction=per_image.mean(),
            adversarial=adversarial,
            discriminator_loss=discriminator_loss,
            judged=judged,
        )

    def quantization(
        self, config: AutoencoderTraining, *, num_latent_values: int
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]] | None:
        """Codebook and commitment loss; a latent scaled by s weighs s^2 where its picture does."""
        quantized = self.pair.quantized
        if quantized is None:
            return None
        if config.reconstruction.resolution_weighting == "equal":
            num_latent_values = quantized.z_q[0].numel()
        return quantized.codebook_loss.mean() / num_latent_values, quantized.commitment_loss.mean() / num_latent_values

    def codes(self, processes: Processes) -> Codes | None:
        """What went to the codebook."""
        quantized = self.pair.quantized
        return None if quantized is None else Codes.of(self.pair.latents, quantized, processes)


def _judge(
    discriminator: Discriminator,
    target: Float[Tensor, "n k h w"],
    fake_logits: Float[Tensor, "n heads _ _"],
    config: AdversarialConfig,
    averages: LogitAverages | None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Let the discriminator see the target too: what it learns from, and its parts."""
    penalties, figures = dict[str, Tensor](), dict[str, Tensor]()
    if config.discriminator_regularization == "r1":
        real_logits, penalties["discriminator_r1"] = r1_penalty(discriminator, target)
    else:
        real_logits = discriminator(target)
    if averages is not None:
        penalties["discriminator_lecam"] = averages.penalty(real_logits, fake_logits)
        figures["real_logit"] = real_logits.detach().float().mean()
    loss, weight = hinge_loss(real_logits, fake_logits), config.discriminator_regularization_weight or 0.0
    return sum((weight * each for each in penalties.values()), loss), {"discriminator": loss, **penalties, **figures}


def mean_over(comparisons: Sequence[Comparison], values: Sequence[Tensor]) -> Tensor:
    """Average a figure over a step's comparisons, weighed as these are."""
    if len(values) == 1:
        return values[0]
    total = sum(each.weight for each in comparisons)
    return torch.stack([each.weight / total * value for each, value in zip(comparisons, values, strict=True)]).sum(0)


def send_back(
    comparisons: Sequence[Comparison],
    regularization: Float[Tensor, ""],
    *,
    config: AutoencoderTraining,
    last_layer: Tensor,
    factor: float,
    processes: Processes,
) -> Tensor:
    """Send all gradients through the decoder, once for each comparison; returns lambda_gan of what weighs most."""
    ends: list[Tensor] = []
    upstream: list[Tensor] = []
    adaptive_weights = []
    for each in comparisons:
        gradient, adaptive_weight = each.seam.gradient(
            last_layer,
            reconstruction=each.reconstruction,
            adversarial=each.adversarial,
            adversarial_weight=config.adversarial.adversarial_weight,
            average=processes.average,
        )
        ends.append(each.seam.decoded)
        upstream.append((factor * each.weight * gradient).to(each.seam.decoded.dtype))
        adaptive_weights.append(adaptive_weight)
    if regularization.requires_grad:  # not where the encoder is deterministic
        ends, upstream = [*ends, factor * regularization], [*upstream, torch.ones_like(regularization)]
    torch.autograd.backward(ends, upstream)
    return adaptive_weights[max(range(len(comparisons)), key=lambda place: comparisons[place].weight)]


def weigh_adaptively(
    terms: Mapping[str, tuple[float, Tensor]],
    z: Float[Tensor, "n c h w"],
    gradient: Float[Tensor, "n c h w"],
    layer: Tensor,
    processes: Processes,
) -> dict[str, Tensor]:
    """Weigh terms by `weight * |grad L| / |grad term|` at a layer of the encoder, as VA-VAE does.

    `gradient` is that of L by z, with its adversarial part; VA-VAE's is without, and takes a second pass through the
    decoder.
    """
    (found,) = torch.autograd.grad(z, layer, gradient, retain_graph=True)
    wanted = processes.average(found).float().norm()
    weights = {}
    for name, (weight, value) in terms.items():
        if not value.requires_grad:  # it has nothing to say in this step
            weights[name] = wanted.new_zeros(())
            continue
        (found,) = torch.autograd.grad(value, layer, retain_graph=True, allow_unused=True)
        norm = wanted.new_zeros(()) if found is None else processes.average(found).float().norm()
        weights[name] = weight * (wanted / (norm + 1e-4)).clamp(0.0, 1e8)
    return weights
