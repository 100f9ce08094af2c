"""A fine-tuning step of an SD-VAE, against the step that the released EQ-VAE code takes.

The peer is written out from the description of LDM's trainer under Lightning 1.4.2: each step encodes and decodes
twice, once for the autoencoder and once for the discriminator, each time with its own tau, in fp32. Ours is
`train_step`. Both start from the same weights (untrained: speed does not depend on them), see the same images, and draw
the autoencoder's tau from the same seeds. A turn is a step of either branch of Equation 7, plain and transformed.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Turn, Variant, Work
from eqvae.autoencoders.loading import build_autoencoder
from eqvae.autoencoders.protocol import Posterior
from eqvae.losses.discriminators import build_discriminator
from eqvae.losses.reconstruction import Perceptual, ReconstructionLoss
from eqvae.methods import Mixture
from eqvae.methods.eq import Eq
from eqvae.methods.kl import Kl
from eqvae.runtime.device import Precision, choose_device, place
from eqvae.runtime.run_folder import from_flat
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import build_state
from eqvae.training.autoencoder_step import train_step
from eqvae.transforms import TransformSampler

SEED = 9
"""With it the first scaled steps keep 0.47 of the image's area on average, near the 0.44 of the distribution."""

BRANCHES = [replace(TransformSampler(), equivariance_probability=p) for p in (0.0, 1.0)]
"""Both branches of Equation 7, each drawn for certain."""


@dataclass(frozen=True, kw_only=True)
class FinetuneStep(Work):
    """A fine-tuning step of an SD-VAE, against the step that the released EQ-VAE code takes."""

    autoencoder: str = "sd-vae"
    """The preset whose architecture is trained, with random weights."""

    image_size: int = 256
    """Side of the images, in px."""

    batch_size: int = 1
    """Images per step."""

    perceptual: Perceptual = "efficientnet-lite0"
    """The perceptual network of both sides; `none` leaves it out."""

    def ways(self) -> dict[str, Variant]:
        """List the variants."""
        return {
            "released": Variant(lambda _: Released(self, num_reconstructions=2).take_turn),
            "released, one reconstruction": Variant(lambda _: Released(self, num_reconstructions=1).take_turn),
            "ours, fp32": Variant(lambda _: self.ours("fp32")),
            "ours": Variant(lambda _: self.ours("bf16"), "bf16"),
        }

    def images(self, number: int) -> Tensor:
        """Draw the images of a step."""
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        return torch.rand(shape, generator=generator_for(SEED, number)) * 2 - 1

    def ours(self, precision: Precision) -> Turn:
        """Prepare `train_step` as `eqvae finetune` calls it, the discriminator past its warm-up."""
        device = choose_device(self.device)
        config = from_flat(
            AutoencoderTraining, batch_size=self.batch_size, lr_warmup_steps=0, discriminator_warmup_steps=0,
            perceptual=self.perceptual, precision=precision, seed=SEED,
        ).resolved()  # fmt: skip
        state = build_state(build_autoencoder(self.autoencoder, seed=SEED), config, device)
        reconstruction_loss = place(ReconstructionLoss(self.perceptual, 1.0), device)
        mixtures = [
            Mixture(pairs=((1.0, Eq(equivariance_probability=branch.equivariance_probability)),), terms=((1e-6, Kl()),))
            for branch in BRANCHES
        ]

        def take_turn() -> dict[str, Any]:
            for mixture in mixtures:
                train_step(state, self.images(state.step).to(device), config, reconstruction_loss, mixture)
            return {"units": len(mixtures)}

        return take_turn


class Released:
    """A training step as LDM's trainer takes it, in fp32 and in PyTorch's default layout."""

    def __init__(self, work: FinetuneStep, num_reconstructions: int) -> None:
        """Prepare the first step."""
        self.work, self.num_reconstructions, self.device = work, num_reconstructions, choose_device(work.device)
        self.autoencoder = build_autoencoder(work.autoencoder, seed=SEED).to(self.device).train()
        self.discriminator = build_discriminator(SEED).to(self.device).train()
        self.reconstruction_loss = ReconstructionLoss(work.perceptual, 1.0).to(self.device)
        adam = {"lr": 1e-4, "betas": (0.5, 0.9)}
        self.optimizer = torch.optim.Adam(self.autoencoder.parameters(), **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), **adam)
        self.num_steps = 0

    def take_turn(self) -> dict[str, Any]:
        """Take a step of either branch."""
        for branch in BRANCHES:
            self.take_step(self.work.images(self.num_steps).to(self.device), branch)
        return {"units": len(BRANCHES)}

    def take_step(self, x: Tensor, sampler: TransformSampler) -> None:
        """Take a step of the autoencoder, then one of the discriminator."""
        # Lightning lets only the parameters of the optimizer whose turn it is require gradients.
        self.autoencoder.requires_grad_(True)
        self.discriminator.requires_grad_(False)
        self.optimizer.zero_grad()
        target, decoded, posterior = self.reconstruct(x, sampler, turn=0)
        reconstruction = self.reconstruction_loss(target, decoded).mean()
        adversarial = -self.discriminator(decoded).mean()
        weight = self.adaptive_weight(reconstruction, adversarial)
        (reconstruction + weight * adversarial + 1e-6 * posterior.kl().mean()).backward()
        self.optimizer.step()

        self.autoencoder.requires_grad_(False)
        self.discriminator.requires_grad_(True)
        self.discriminator_optimizer.zero_grad()
        if self.num_reconstructions == 2:
            target, decoded, _ = self.reconstruct(x, sampler, turn=1)
            self.reconstruction_loss(target, decoded)  # computed before the loss asks whose turn it is
        real, fake = self.discriminator(target), self.discriminator(decoded.detach())
        (0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())).backward()
        self.discriminator_optimizer.step()
        self.num_steps += 1

    def reconstruct(self, x: Tensor, sampler: TransformSampler, turn: int) -> tuple[Tensor, Tensor, Posterior]:
        """Draw tau; return tau o x, D(tau o E(x)) and the posterior."""
        latent_size = (x.shape[-2] // self.autoencoder.stride, x.shape[-1] // self.autoencoder.stride)
        generator = generator_for(SEED, self.num_steps, turn)
        tau = sampler.draw(latent_size, generator).tau
        posterior = self.autoencoder.encode(x)
        z = posterior.sample(torch.randn(posterior.mean.shape, generator=generator).to(x.device))
        return tau(x), self.autoencoder.decode(tau(z)), posterior

    def adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Compare the two losses' gradients at the decoder's last layer, each by a backward pass of its own."""
        last_layer = self.autoencoder.last_layer.weight
        (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (other,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        return 0.5 * (wanted.norm() / (other.norm() + 1e-4)).clamp(0.0, 1e4).detach()
