"""GAT's losses: a relativistic game on latents at four levels of noise (Hyun et al., arXiv:2509.24935).

    L_D = f(D(x) - D(x')) + gamma_1 / 2 R1 + gamma_2 / 2 R2        L_G = f(D(x') - D(x))        f(a) = log(1 + e^-a)

x are true latents and x' the generator's, of the same class (R3GAN's pairing, arXiv:2501.05441). D sees an image four
times, the generator's four levels or the true latent repeated, each augmented alike and blurred by its level's noise:

    (1 - t_i) x_i + t_i e_i,    t_i = 1 - (1/8)^(1 - i/3) + 0.01,    i = 0 ... 3

so that coarse outputs are judged where noise hides what they lack (multi-level noise-perturbed image guidance). The
e_i of one image are a chain: from the least noise on, each level adds to the noise of the level before.

R1 and R2 are the squared gradients of D at x and x', estimated by a difference (APT, arXiv:2501.08316):
`((D(x + 0.01 n) - D(x)) / 0.01)^2` with fresh n and all other draws the same. As published without a teacher: the
alignment of D with DINOv2, which the authors' best models have besides, is not here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.generators.augmentation import NUM_DRAWS, Augmentation
from eqvae.generators.gat_transformer import NUM_LEVELS, STYLE_SIZE
from eqvae.generators.protocol import LatentSpecification, Loss

_LEAST_INFORMATION = 1 / 8
_LEAST_NOISE = 0.01
_PERTURBATION = 0.01

_TRUE, _DRAWN = 0, 1  # which images a set of draws is for
_OF_DISCRIMINATOR, _OF_GENERATOR = 0, 2  # and in which of a step's halves: both draw anew


@dataclass(frozen=True, kw_only=True)
class GatConfig:
    """How GAT is trained."""

    owner: ClassVar[str] = "GAT"

    r1_weight: float = 0.1
    """GAT: of the discriminator's squared gradient at true latents; the formula halves it."""

    r2_weight: float = 0.1
    """GAT: of the same at the generator's."""

    penalty_every: int = 1
    """GAT: steps between those with R1 and R2; others are cheaper by half."""

    augment: bool = True
    """GAT: colour, shift, cut out and mirror what the discriminator sees (DiffAugment, arXiv:2006.10738)."""


@dataclass(frozen=True, kw_only=True)
class GatObjective:
    """Both sides of the game, for one batch of pairs: the generator's latents have the labels of the true ones.

    The generator makes levels (4, n, c, h, w) of styles (n, 64) and labels, the discriminator logits (n,) of levels and
    labels.
    """

    r1_weight: float = 0.1
    r2_weight: float = 0.1
    penalty_every: int = 1
    augment: bool = True

    def draw(self, num: int, specification: LatentSpecification, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw all random numbers of one step, both halves; see `eqvae.generators.protocol.Objective`."""
        shape = specification.shape
        return {
            "style": torch.randn(num, STYLE_SIZE, generator=generator),
            "augmentation": torch.rand(num, 4, NUM_DRAWS, generator=generator),
            "noise": torch.randn(num, 4, NUM_LEVELS, *shape, generator=generator),
            "perturbation": torch.randn(num, 1 + NUM_LEVELS, *shape, generator=generator),
        }

    def discriminator_loss(
        self,
        generator: Callable[..., Tensor],
        discriminator: Callable[..., Tensor],
        latents: Float[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"],
        draws: Mapping[str, Tensor],
        *,
        penalize: bool = True,
    ) -> Loss:
        """Compute L_D, differentiable with respect to the discriminator; parts `r1` and `r2` before their weights."""
        with torch.no_grad():
            drawn = generator(draws["style"], labels)
        true = latents.expand_as(drawn)
        views = [self._see(true, draws, _OF_DISCRIMINATOR + _TRUE), self._see(drawn, draws, _OF_DISCRIMINATOR + _DRAWN)]
        if penalize:
            moves = draws["perturbation"].transpose(0, 1) * _PERTURBATION
            views += [
                self._see(true, draws, _OF_DISCRIMINATOR + _TRUE, moves[:1]),
                self._see(drawn, draws, _OF_DISCRIMINATOR + _DRAWN, moves[1:]),
            ]
        logits = discriminator(torch.cat(views, dim=1), labels.repeat(len(views))).chunk(len(views))
        loss = F.softplus(logits[_DRAWN] - logits[_TRUE])
        margin = (logits[_TRUE] - logits[_DRAWN]).detach()
        if not penalize:
            return Loss(total=loss, parts={"discriminator": loss.detach(), "margin": margin})
        r1, r2 = (
            ((moved - still) / _PERTURBATION).square() for still, moved in zip(logits[:2], logits[2:], strict=True)
        )
        return Loss(
            total=loss + self.r1_weight / 2 * r1 + self.r2_weight / 2 * r2,
            parts={"discriminator": loss.detach(), "margin": margin, "r1": r1.detach(), "r2": r2.detach()},
        )

    def generator_loss(
        self,
        generator: Callable[..., Tensor],
        discriminator: Callable[..., Tensor],
        latents: Float[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"],
        draws: Mapping[str, Tensor],
    ) -> Loss:
        """Compute L_G, differentiable with respect to the generator."""
        drawn = generator(draws["style"], labels)
        with torch.no_grad():
            true = discriminator(self._see(latents.expand_as(drawn), draws, _OF_GENERATOR + _TRUE), labels)
        return Loss(
            total=F.softplus(true - discriminator(self._see(drawn, draws, _OF_GENERATOR + _DRAWN), labels)), parts={}
        )

    def _see(
        self,
        levels: Float[Tensor, "levels n c h w"],
        draws: Mapping[str, Tensor],
        which: int,
        moves: Float[Tensor, "some n c h w"] | None = None,
    ) -> Float[Tensor, "levels n c h w"]:
        """Make of an image's levels, moved or not, what the discriminator sees."""
        moved = levels if moves is None else levels + moves
        if self.augment:  # by the statistics of the sample, which is the last level
            augmentation = Augmentation.draw(draws["augmentation"][:, which], levels[-1])
            moved = torch.stack([augmentation(level) for level in moved])
        return add_noise(moved, draws["noise"][:, which].transpose(0, 1))


def noise_levels() -> tuple[float, ...]:
    """The t_i, from coarse to fine: 0.885, 0.76, 0.51, 0.01."""
    shares = [index / (NUM_LEVELS - 1) for index in range(NUM_LEVELS)]
    return tuple(1.0 - _LEAST_INFORMATION ** (1.0 - share) + _LEAST_NOISE for share in shares)


def add_noise(
    levels: Float[Tensor, "levels n c h w"], noise: Float[Tensor, "levels n c h w"]
) -> Float[Tensor, "levels n c h w"]:
    """Blur each level by its share of noise; together an image's four are a path of one diffusion.

    The noise of a level is that of the finer one, faded by `(1 - t) / (1 - t_finer)`, and as much of its own as makes
    its variance t^2.
    """
    blurred: list[Tensor] = []
    total, finer = torch.zeros_like(noise[0]), 0.0
    for t, level, own in zip(reversed(noise_levels()), levels.flip(0), noise.flip(0), strict=True):
        fading = (1.0 - t) / (1.0 - finer)
        total = fading * total + (t**2 - (finer * fading) ** 2) ** 0.5 * own
        blurred.append((1.0 - t) * level + total)
        finer = t
    return torch.stack(blurred[::-1])
