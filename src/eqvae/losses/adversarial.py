"""L_gan of Equation 1: PatchGAN with the hinge loss, and a watchdog over the discriminator."""

from collections import deque

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al., 2017): a logit for each patch of 70 px, under the published parameter names `main.N`."""

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        """Build with LDM's initialization: weights N(0, 0.02), batch normalization scales N(1, 0.02)."""
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, num_layers + 1):
            wider = width * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(channels, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
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
