"""L_gan of Equations 1 and 5: the hinge loss and its regularization, LDM's adaptive weight, a watchdog over them."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eqvae.errors import UserError

Regularization = Literal["none", "r1", "lecam"]

_WEIGHTS: dict[Regularization, float | None] = {"none": None, "r1": 0.1, "lecam": 0.001}
"""Of the regularizations. Mescheder et al.'s gamma of 10, and 1 too, silence PatchGAN under a hinge (docs/log.md);
LeCam's is that of TiTok's tokenizers (bytedance/1d-tokenizer)."""

_LECAM_DECAY = 0.999
"""TiTok's."""

_LARGEST_RATIO = 1e4
"""LDM's clamp of the adaptive weight, before `adversarial_weight`."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The discriminator's part."""

    adversarial_weight: float = 0.5
    """Weight of L_gan on top of LDM's adaptive weight; 0 trains no discriminator."""

    discriminator_warmup_steps: int | None = None
    """First steps, in which only the discriminator learns; None: a twentieth of max_steps, at most 1,000, and 0 where
    `discriminator` is loaded."""

    discriminator: str | None = None
    """Begin with a discriminator that has learnt already: of a run's folder or a folder that one exported, or PatchGAN
    in a checkpoint of LDM or taming-transformers (`loss.discriminator.*`). None: a fresh PatchGAN."""

    discriminator_features: str | None = None
    """Instead of PatchGAN, train heads on features of a frozen network: `efficientnet-lite0`, which works offline, or a
    model of timm, `vit_small_patch14_dinov2.lvd142m` say."""

    discriminator_features_weights: Path | None = None
    """File of that network's weights; None: timm's cache or the network."""

    discriminator_regularization: Regularization = "none"
    """`r1` holds the discriminator's gradient at true images down (arXiv:1801.04406), `lecam` its logits near where
    those of the other side have been (arXiv:2104.03144)."""

    discriminator_regularization_weight: float | None = None
    """Weight of it beside the hinge loss, gamma for R1; None: 0.1 for R1, 0.001 for LeCam."""

    def resolved(self, *, warmup_steps: int) -> "AdversarialConfig":
        """Fill in every None, a fresh discriminator's warm-up with so many steps, and refuse what contradicts."""
        kind, weight = self.discriminator_regularization, self.discriminator_regularization_weight
        is_loaded, has_features = self.discriminator is not None, self.discriminator_features is not None
        asked = {
            "--discriminator": is_loaded,
            "--discriminator-features": has_features,
            "--discriminator-regularization": kind != "none",
        }
        for flag, is_given in asked.items():
            if is_given and self.adversarial_weight == 0:
                raise UserError(f"{flag} has no place: --adversarial-weight 0 trains none", "Leave out one of them")
        if is_loaded and has_features:
            raise UserError(
                f"--discriminator '{self.discriminator}' says itself what it looks at, and so does "
                f"--discriminator-features {self.discriminator_features}",
                "Leave out one of them",
            )
        if self.discriminator_features_weights is not None and not (is_loaded or has_features):
            raise UserError("--discriminator-features-weights has no place", "Give --discriminator-features too")
        if weight is not None and kind == "none":
            raise UserError(
                f"--discriminator-regularization-weight {weight:g} has no place",
                "Give --discriminator-regularization r1 or lecam too",
            )
        warmup = self.discriminator_warmup_steps
        if warmup is None:
            warmup = 0 if is_loaded else warmup_steps
        return replace(
            self,
            discriminator_warmup_steps=warmup if self.adversarial_weight > 0 else 0,
            discriminator_regularization_weight=_WEIGHTS[kind] if weight is None else weight,
        )


def hinge_loss(
    real_logits: Float[Tensor, "n heads h w"], fake_logits: Float[Tensor, "n heads h w"]
) -> Float[Tensor, ""]:
    """The discriminator's loss: half of `relu(1 - real) + relu(1 + fake)`, averaged over patches."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def r1_penalty(
    discriminator: nn.Module, x: Float[Tensor, "n k h w"]
) -> tuple[Float[Tensor, "n heads _ _"], Float[Tensor, ""]]:
    """Logits of true images, and R1: `1/2 E |grad_x D(x)|^2` (Mescheder et al., arXiv:1801.04406, without gamma).

    Of P logits, one for each patch, it is the gradient of their sum, and its square over P: a patch's own penalty,
    whatever the picture's size, and with one logit Mescheder's.
    """
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention can't be differentiated twice
        logits = discriminator(x)
    (gradient,) = torch.autograd.grad(logits.float().sum(), x, create_graph=True)
    return logits, 0.5 * gradient.float().square().flatten(1).sum(1).mean() / logits[0].numel()


@dataclass(kw_only=True)
class LogitAverages:
    """LeCam's moving averages of the mean logit, over steps: part of a run's state."""

    real: float = 0.0
    fake: float = 0.0
    num_updates: int = 0

    def update(self, *, real: float, fake: float) -> None:
        """Take in a step's mean logits; the first ones are the average."""
        decay = _LECAM_DECAY if self.num_updates else 0.0
        self.real = decay * self.real + (1.0 - decay) * real
        self.fake = decay * self.fake + (1.0 - decay) * fake
        self.num_updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """All that a resume needs."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in vars(self).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        self.real, self.fake = float(tensors["real"]), float(tensors["fake"])
        self.num_updates = int(tensors["num_updates"])

    def penalty(
        self, real_logits: Float[Tensor, "n heads h w"], fake_logits: Float[Tensor, "n heads h w"]
    ) -> Float[Tensor, ""]:
        """LeCam: `E relu(D(x) - a_fake)^2 + E relu(a_real - D(y))^2` (arXiv:2104.03144, as its authors' code has it).

        a are the averages of the steps before; the paper's own is without relu. 0 in the first step.
        """
        if self.num_updates == 0:
            return real_logits.new_zeros((), dtype=torch.float32)
        real, fake = real_logits.float(), fake_logits.float()
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()


@dataclass(frozen=True, kw_only=True)
class Seam:
    """The end of the autoencoder's graph, cut open, so that all losses of the image share one pass through the decoder.

    Both gradients that LDM's adaptive weight compares are known here, and each costs one convolution's weight gradient.
    """

    decoded: Float[Tensor, "n k h w"]
    """D(tau o E(x)), where the autoencoder's graph ends."""

    image: Float[Tensor, "n k h w"]
    """The same values, in float32, as the leaf on which L_rec and L_gan depend."""

    @classmethod
    def cut(cls, decoded: Float[Tensor, "n k h w"]) -> "Seam":
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
    ) -> tuple[Float[Tensor, "n k h w"], Float[Tensor, ""]]:
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
            adaptive_weight = adversarial_weight * ratio.clamp(0.0, _LARGEST_RATIO)
            gradient = gradient + adaptive_weight * against
        return gradient, adaptive_weight


class Watchdog:
    """Looks at a window of steps and says when the discriminator no longer teaches anything, and what mends it."""

    def __init__(
        self, window: int = 200, *, clamp: float = math.inf, warmup_steps: int = 0, has_r1: bool = False
    ) -> None:
        """Start with an empty window; `clamp` is the largest adaptive weight."""
        self._losses: deque[float] = deque(maxlen=window)
        self._weights: deque[float] = deque(maxlen=window)
        self._clamp = clamp
        self._said: str | None = None
        self._wake = (
            "begin in another --out with --discriminator FROM, which loads one that has learnt already, or with "
            f"--discriminator-warmup-steps {max(500, 2 * warmup_steps)}"
        )
        weight = "--discriminator-regularization-weight"
        self._wake += f", or a lower {weight}" if has_r1 else ""
        self._hold = f"a higher {weight}" if has_r1 else "--discriminator-regularization r1"

    @classmethod
    def over(cls, config: AdversarialConfig) -> "Watchdog":
        """Watch over a run."""
        return cls(
            clamp=config.adversarial_weight * _LARGEST_RATIO,
            warmup_steps=config.discriminator_warmup_steps or 0,
            has_r1=config.discriminator_regularization == "r1",
        )

    def look(self, discriminator_loss: float, adaptive_weight: float = 0.0) -> str | None:
        """Take in one step's hinge loss and adaptive weight."""
        self._losses.append(discriminator_loss)
        self._weights.append(adaptive_weight)
        window = self._losses.maxlen or 0
        if len(self._losses) < window:
            return None
        mean = sum(self._losses) / window
        deviation = max(self._losses) - min(self._losses)
        verdict = None
        if mean < 0.02:
            verdict = (
                f"the discriminator is saturated (hinge loss {mean:.3f}): begin in another --out with a lower "
                f"--adversarial-weight, or with {self._hold}"
            )
        elif abs(mean - 1.0) < 0.005 and deviation < 0.02:
            verdict = f"the discriminator is dead (hinge loss stays at chance): {self._wake}"
        elif sum(weight > 0.999 * self._clamp for weight in self._weights) >= window / 2:
            verdict = f"the adaptive weight stands at its clamp of {self._clamp:,.0f}: {self._wake}"
        changed, self._said = verdict != self._said, verdict
        return verdict if changed else None
