"""MaskGIT: hidden tokens are guessed from the others (Chang et al., arXiv:2202.04200).

Named sizes: `maskgit-b`, `-l` and `-h` are "base", "big" and "huge" of Besnier & Chen's code (arXiv:2310.14400);
`maskgit-ti` and `-s` are ours, for CPUs.

They trained `maskgit-b` for 300 epochs of batch 512 by AdamW with rate 1e-4 after 2,500 steps of warm-up, betas 0.9 and
0.96, weight decay 1e-5, gradients clipped to 1, and without averaged weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from eqvae.errors import UserError, nearest_name
from eqvae.generators.maskgit_transformer import MaskTransformerConfig
from eqvae.generators.masking import Schedule, masks_from_uniform
from eqvae.generators.protocol import LatentSpecification, Loss, Objective, drop_labels

PredictTokens = Callable[[Tensor, Tensor], Tensor]
"""A backbone of tokens: partly masked tokens (n, h, w) int64 and labels (n,) int64 to logits (n, h, w, codes).

The token `codes`, one after the last code, is the mask; the label `num_classes` means "no class"."""

LossTokens = Literal["masked", "all"]
"""`masked`: Equation 2 of MaskGIT. `all`: the code of Besnier & Chen, which learns to repeat visible tokens too."""


@dataclass(frozen=True, kw_only=True)
class MaskgitObjective(Objective):
    """The cross-entropy of the true tokens, given those that are not masked (Equation 2 of MaskGIT).

    Its latents are tokens, and a specification's channels are the codes of the codebook.
    """

    codebook_size: int
    """Codes; the next index is the mask."""

    num_classes: int
    """Of the tokens; dropped labels become this."""

    schedule: Schedule = "arccos"
    """How many tokens are masked."""

    label_dropout: float = 0.1
    """Probability of training without the label."""

    label_smoothing: float = 0.1
    """Share of each target that is spread evenly over all codes; 0.1 in the code of Besnier & Chen."""

    loss_tokens: LossTokens = "masked"
    """Which tokens count."""

    def out_channels(self, channels: int) -> int:
        """See `Objective`: a logit for each code."""
        return channels

    def draw(self, num: int, specification: LatentSpecification, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw `mask`, `weight`, and `drop` for the labels; see `Objective`.

        An image's weight is its number of masked tokens over that of the mean image, so that the mean over the global
        batch is the mean over its masked tokens, as in Equation 2, however the batch is shared out.
        """
        share_uniform = torch.rand(num, generator=generator)
        cell_uniform = torch.rand(num, specification.height, specification.width, generator=generator)
        mask = masks_from_uniform(self.schedule, share_uniform, cell_uniform)
        counts = mask.flatten(1).sum(1).double()
        weight = (counts / counts.mean()).float()
        return {"mask": mask, "weight": weight, "drop": torch.rand(num, generator=generator)}

    def loss(
        self,
        predict: PredictTokens,  # no time: the mask itself says how much is hidden
        latents: Int64[Tensor, "n h w"],
        labels: Int64[Tensor, " n"],
        draws: Mapping[str, Tensor],
    ) -> Loss:
        """Compute the loss, and on masked tokens `cross_entropy` in nats without smoothing, and `accuracy`.

        On masked tokens all carry the image's weight, so that means over a batch are means over its masked tokens; see
        `Objective`.
        """
        mask, weight = draws["mask"], draws["weight"]
        seen = drop_labels(labels, draws["drop"], probability=self.label_dropout, null_label=self.num_classes)
        logits = predict(torch.where(mask, self.codebook_size, latents), seen)
        # At least float32: of what autocasts gives, 8 bits would be left of a sum over all codes.
        log_likelihoods = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        surprise = -log_likelihoods.gather(-1, latents[..., None]).squeeze(-1)
        spread = -log_likelihoods.mean(-1)
        smoothed = (1 - self.label_smoothing) * surprise + self.label_smoothing * spread
        is_right = (logits.argmax(-1) == latents).to(surprise.dtype)
        total = smoothed.flatten(1).mean(1) if self.loss_tokens == "all" else weight * _mean_over(mask, smoothed)
        return Loss(
            total=total,
            parts={
                "cross_entropy": weight * _mean_over(mask, surprise.detach()),
                "accuracy": weight * _mean_over(mask, is_right),
            },
        )


def _mean_over(mask: Bool[Tensor, "n h w"], values: Float[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True)
class MaskgitSize:
    """A size of the network."""

    depth: int

    hidden_size: int

    num_heads: int

    mlp_size: int

    num_parameters: int
    """With `PUBLISHED_TOKENS`; 174.161 million for `b` in the table of Besnier & Chen."""


PUBLISHED_TOKENS = LatentSpecification(channels=1024, height=16, width=16, num_classes=1000)
"""ImageNet at 256 px through the VQ-GAN with stride 16 and 1024 codes."""

# fmt: off
_ROWS = (
    # size depth width heads mlp   parameters
    ("ti", 8,    192,  3,    768,  4_630_634),
    ("s",  12,   384,  6,    1536, 23_137_514),
    ("b",  24,   768,  16,   3072, 174_160_874),
    ("l",  32,   1024, 16,   3072, 341_953_002),
    ("h",  48,   1024, 16,   3072, 509_921_770),
)
# fmt: on

MASKGIT_SIZES: dict[str, MaskgitSize] = {
    name: MaskgitSize(depth=depth, hidden_size=width, num_heads=heads, mlp_size=mlp, num_parameters=parameters)
    for name, depth, width, heads, mlp, parameters in _ROWS
}
"""All sizes by name."""

MASKGIT_NAMES: tuple[str, ...] = tuple(f"maskgit-{size}" for size in MASKGIT_SIZES)
"""All presets."""


@dataclass(frozen=True, kw_only=True)
class MaskgitRecipe:
    """A named MaskGIT: what to build and what to train it for."""

    size: str
    """One of `MASKGIT_SIZES`."""

    family: ClassVar[Literal["maskgit"]] = "maskgit"

    def __str__(self) -> str:
        """The name that `parse_maskgit_recipe` reads."""
        return f"{self.family}-{self.size}"

    def objective(
        self,
        tokens: LatentSpecification,
        *,
        schedule: Schedule = "arccos",
        label_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        loss_tokens: LossTokens = "masked",
    ) -> MaskgitObjective:
        """Build what it is trained for."""
        return MaskgitObjective(
            codebook_size=tokens.channels,
            num_classes=tokens.num_classes,
            schedule=schedule,
            label_dropout=label_dropout,
            label_smoothing=label_smoothing,
            loss_tokens=loss_tokens,
        )

    def transformer(self, tokens: LatentSpecification) -> MaskTransformerConfig:
        """Describe the backbone."""
        size = MASKGIT_SIZES[self.size]
        return MaskTransformerConfig(
            latents=tokens,
            depth=size.depth,
            hidden_size=size.hidden_size,
            num_heads=size.num_heads,
            mlp_size=size.mlp_size,
        )


def parse_maskgit_recipe(name: str) -> MaskgitRecipe:
    """Read a preset's name."""
    if name.lower() not in MASKGIT_NAMES:
        raise UserError(f"there is no generator '{name}'", nearest_name(name.lower(), MASKGIT_NAMES))
    return MaskgitRecipe(size=name.lower().removeprefix("maskgit-"))
