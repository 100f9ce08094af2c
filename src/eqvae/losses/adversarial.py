"""L_gan of Equations 1 and 5: PatchGAN with the hinge loss, LDM's adaptive weight, a watchdog over both."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.runtime.processes import count_processes, sum_with_gradient


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The discriminator's part."""

    adversarial_weight: float = 0.5
    """Weight of L_gan on top of LDM's adaptive weight; 0 trains no discriminator."""

    discriminator_warmup_steps: int | None = None
    """First steps, in which only the discriminator learns; None: a twentieth of max_steps, at most 1,000."""


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the batch of all processes together, on any device (PyTorch's needs accelerators)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize by the global batch's mean and variance."""
        num_processes = count_processes()
        if num_processes == 1 or not self.training:
            return super().forward(input)
        values = input.float()
        count = num_processes * values[:, 0].numel()
        mean = sum_with_gradient(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = sum_with_gradient(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al., 2017): a logit for each patch of 70 px; `N.weight` is `main.N.weight` elsewhere."""

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        """Build with LDM's initialization: weights N(0, 0.02), batch normalization scales N(1, 0.02)."""
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, num_layers + 1):
            wider = width * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                GlobalBatchNorm(wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        super().__init__(*layers)
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


MIN_IMAGE_SIZE_PX = 24
"""The smallest image on which three layers leave a patch."""


def hinge_loss(real_logits: Float[Tensor, "n 1 h w"], fake_logits: Float[Tensor, "n 1 h w"]) -> Float[Tensor, ""]:
    """The discriminator's loss: half of `relu(1 - real) + relu(1 + fake)`, averaged over patches."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


@dataclass(frozen=True, kw_only=True)
class Seam:
    """The end of the autoencoder's graph, cut open, so that all losses of the image share one pass through the decoder.

    Both gradients that LDM's adaptive weight compares are known here, and each costs one convolution's weight gradient.
    """

    decoded: Float[Tensor, "n 3 h w"]
    """D(tau o E(x)), where the autoencoder's graph ends."""

    image: Float[Tensor, "n 3 h w"]
    """The same values, in float32, as the leaf on which L_rec and L_gan depend."""

    @classmethod
    def cut(cls, decoded: Float[Tensor, "n 3 h w"]) -> "Seam":
        """Cut the graph after the decoder."""
        return cls(decoded=decoded, image=decoded.detach().float().requires_grad_())

    def gradient(
        self,
        last_layer: Tensor,
        *,
        reconstruction: Float[Tensor, ""],
        adversarial: Float[Tensor, ""] | None,
        adversarial_weight: float,
        average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, ""]]:
        """Compute the gradient of `L_rec + lambda_gan L_gan`, functions of `image`, and lambda_gan.

        `last_layer` is the weight at which the adaptive weight, lambda_gan, is measured:
        `adversarial_weight * |grad L_rec| / |grad L_gan|`; `average` averages gradients over processes.
        """
        (gradient,) = torch.autograd.grad(reconstruction, self.image)
        adaptive_weight = self.image.new_zeros(())
        if adversarial_weight > 0 and adversarial is not None:
            (against,) = torch.autograd.grad(adversarial, self.image, retain_graph=True)

            def norm_at_last_layer(upstream: Tensor) -> Tensor:
                upstream = upstream.to(self.decoded.dtype)
                (found,) = torch.autograd.grad(self.decoded, last_layer, upstream, retain_graph=True)
                return average(found).float().norm()

            ratio = norm_at_last_layer(gradient) / (norm_at_last_layer(against) + 1e-4)
            adaptive_weight = adversarial_weight * ratio.clamp(0.0, 1e4)
            gradient = gradient + adaptive_weight * against
        return gradient, adaptive_weight


class Watchdog:
    """Looks at the discriminator's loss over a window of steps and says when it no longer teaches anything."""

    def __init__(self, window: int = 200) -> None:
        """Start with an empty window."""
        self._losses: deque[float] = deque(maxlen=window)
        self._said: str | None = None

    def look(self, discriminator_loss: float) -> str | None:
        """Take in one step's hinge loss."""
        self._losses.append(discriminator_loss)
        if len(self._losses) < (self._losses.maxlen or 0):
            return None
        mean = sum(self._losses) / len(self._losses)
        deviation = max(self._losses) - min(self._losses)
        verdict = None
        if mean < 0.02:
            verdict = f"the discriminator is saturated (hinge loss {mean:.3f}): lower its learning rate or its weight"
        elif abs(mean - 1.0) < 0.005 and deviation < 0.02:
            verdict = "the discriminator is dead (hinge loss stays at chance): raise its learning rate or its warm-up"
        changed, self._said = verdict != self._said, verdict
        return verdict if changed else None


def build_discriminator(seed: int) -> PatchDiscriminator:
    """Build a discriminator whose first weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminator()
