"""The families of generators, each at its sizes: what to build, what to train it for and with what.

    dit-b-2, sit-xl-2, repa-sit-xl-2    family, size and patch size, on latents
    gat-b-2                             the same, a generator against a discriminator
    maskgit-b                           family and size, on tokens

Sizes are those of Table 1 of arXiv:2212.09748, which GAT has too; `ti` is ours, for CPUs. What a family fixes is what
its published checkpoints were trained with, so that they sample as published.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import isqrt
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from eqvae.errors import UserError, nearest_name
from eqvae.generators.diffusion import DiffusionObjective, DitConfig, GaussianDiffusion
from eqvae.generators.gat import GatConfig, GatObjective
from eqvae.generators.gat_published import from_published, to_published
from eqvae.generators.gat_transformer import GAT_SIZES, NUM_LEVELS, GatNetworkConfig
from eqvae.generators.interpolant import Interpolant, InterpolantObjective, SitConfig
from eqvae.generators.maskgit import MaskgitConfig, MaskgitObjective
from eqvae.generators.maskgit_transformer import MASKGIT_SIZES, MaskTransformerConfig
from eqvae.generators.protocol import LatentSpecification, Objective, ReadingConfig
from eqvae.generators.recipes import SIZES, BackboneConfig, FamilyConfig, Published, Recipe
from eqvae.generators.repa import RepaConfig, RepaObjective
from eqvae.generators.transformer import TransformerConfig

PATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class LatentRecipe(Recipe):
    """A family that models latents by DiT's transformer."""

    patch_size: int
    """Cells."""

    reading: ReadingConfig = field(default_factory=ReadingConfig)

    dit: DitConfig = field(default_factory=DitConfig)

    models: ClassVar[Literal["moments"]] = "moments"
    mend: ClassVar[str] = "Train a MaskGIT on it, or encode with a KL model"
    draws: ClassVar[Literal["process"]] = "process"
    published: ClassVar[Published] = Published()
    backbone_config: ClassVar[type[TransformerConfig]] = TransformerConfig

    def __str__(self) -> str:
        return f"{self.family}-{self.size}-{self.patch_size}"

    @abstractmethod
    def objective(self, latents: LatentSpecification, *, label_dropout: float = 0.1) -> Objective: ...

    def transformer(self, latents: LatentSpecification) -> TransformerConfig:
        """Describe the network; REPA's projector is as wide as a teacher that is not known yet."""
        size = SIZES[self.size]
        return TransformerConfig(
            latents=latents,
            depth=size.depth,
            hidden_size=size.hidden_size,
            num_heads=size.num_heads,
            patch_size=self.patch_size,
            out_channels=self.objective(latents).out_channels(latents.channels),
            qk_norm=self.dit.qk_norm,
        )

    def fit(self, weights: Mapping[str, Tensor], *, codebook_size: int | None) -> TransformerConfig:
        """See `Recipe`: also output channels, normalized queries and keys, and REPA's projector."""
        del codebook_size
        labels, projector = weights.get("y_embedder.embedding_table.weight"), weights.get("projectors.0.2.weight")
        side = isqrt(weights["pos_embed"].shape[1]) * self.patch_size
        latents = LatentSpecification(
            channels=weights["x_embedder.proj.weight"].shape[1],
            height=side,
            width=side,
            num_classes=0 if labels is None else len(labels) - 1,
        )
        config = replace(
            self.transformer(latents),
            out_channels=len(weights["final_layer.linear.bias"]) // self.patch_size**2,
            qk_norm="blocks.0.attn.q_norm.weight" in weights,
        )
        if projector is None:
            return config
        teacher_channels = len(weights["projectors.0.4.bias"])
        return replace(config, teacher_channels=teacher_channels, projector_width=len(projector))


@final
@dataclass(frozen=True, kw_only=True)
class Dit(LatentRecipe):
    """Diffusion with learned variances, Peebles & Xie, arXiv:2212.09748."""

    family: ClassVar[str] = "dit"
    samplers: ClassVar[dict[str, int]] = {"ddpm": 250, "ddim": 250}
    sampler: ClassVar[str] = "ddpm"

    def objective(self, latents: LatentSpecification, *, label_dropout: float = 0.1) -> DiffusionObjective:
        diffusion = GaussianDiffusion()
        return DiffusionObjective(num_classes=latents.num_classes, diffusion=diffusion, label_dropout=label_dropout)


@dataclass(frozen=True, kw_only=True)
class InterpolantRecipe(LatentRecipe):
    """A family that is trained on a path between data and noise."""

    sit: SitConfig = field(default_factory=SitConfig)

    time_of_data: ClassVar[Literal[0, 1]]
    doubled_output: ClassVar[bool]
    samplers: ClassVar[dict[str, int]] = {"euler": 250, "heun": 250, "dopri5": 250, "sde": 250}
    sampler: ClassVar[str] = "sde"

    @property
    def interpolant(self) -> Interpolant:
        return Interpolant(path=self.sit.path, prediction=self.sit.prediction, time_of_data=self.time_of_data)

    def path_objective(self, latents: LatentSpecification, label_dropout: float) -> InterpolantObjective:
        """Build SiT's part of what it is trained for."""
        return InterpolantObjective(
            num_classes=latents.num_classes,
            interpolant=self.interpolant,
            weight=self.sit.loss_weight,
            doubled_output=self.doubled_output,
            label_dropout=label_dropout,
        )


@final
@dataclass(frozen=True, kw_only=True)
class Sit(InterpolantRecipe):
    """Stochastic interpolants, Ma et al., arXiv:2401.08740; its checkpoints run from noise at t = 0 to data."""

    family: ClassVar[str] = "sit"
    time_of_data: ClassVar[Literal[0, 1]] = 1
    doubled_output: ClassVar[bool] = True

    def objective(self, latents: LatentSpecification, *, label_dropout: float = 0.1) -> InterpolantObjective:
        return self.path_objective(latents, label_dropout)


@final
@dataclass(frozen=True, kw_only=True)
class RepaSit(InterpolantRecipe):
    """SiT aligned with a teacher, Yu et al., arXiv:2410.06940; its checkpoints run from data at t = 0 to noise."""

    repa: RepaConfig = field(default_factory=RepaConfig)

    family: ClassVar[str] = "repa-sit"
    time_of_data: ClassVar[Literal[0, 1]] = 0
    doubled_output: ClassVar[bool] = False
    published: ClassVar[Published] = Published(max_grad_norm=1.0)

    def __post_init__(self) -> None:
        if self.repa_depth > SIZES[self.size].depth:
            raise UserError(f"--repa-depth is {self.repa_depth}", f"'{self}' has {SIZES[self.size].depth} blocks")

    @property
    def repa_depth(self) -> int:
        """The block whose tokens are aligned: 8; half way where there are no more than 8."""
        depth = SIZES[self.size].depth
        return self.repa.repa_depth or (8 if depth > 8 else depth // 2)

    def objective(self, latents: LatentSpecification, *, label_dropout: float = 0.1) -> RepaObjective:
        inner = self.path_objective(latents, label_dropout)
        return RepaObjective(objective=inner, depth=self.repa_depth, weight=self.repa.repa_weight)


@final
@dataclass(frozen=True, kw_only=True)
class Gat(Recipe):
    """A GAN of transformers, Hyun et al., arXiv:2509.24935; the rate falls with the networks' width."""

    patch_size: int
    """Cells."""

    reading: ReadingConfig = field(default_factory=ReadingConfig)

    gat: GatConfig = field(default_factory=GatConfig)

    family: ClassVar[str] = "gat"
    models: ClassVar[Literal["moments"]] = "moments"
    mend: ClassVar[str] = LatentRecipe.mend
    draws: ClassVar[Literal["pass"]] = "pass"
    published: ClassVar[Published] = Published(
        learning_rate=2e-4, adam_beta1=0.0, adam_beta2=0.99, max_grad_norm=1.0, ema_decay=0.999, label_dropout=0.0,
        watch_steps=1,
    )  # fmt: skip
    samplers: ClassVar[dict[str, int]] = {"one-pass": 1}
    sampler: ClassVar[str] = "one-pass"
    unadaptable: ClassVar[str] = "its discriminator would begin anew, and unteach it"
    backbone_config: ClassVar[type[GatNetworkConfig]] = GatNetworkConfig

    def __str__(self) -> str:
        return f"{self.family}-{self.size}-{self.patch_size}"

    def values(self) -> Published:
        """See `Recipe`: the published rate is that of width 768."""
        rate = self.published.learning_rate * GAT_SIZES["b"].hidden_size / GAT_SIZES[self.size].hidden_size
        return self.published._replace(learning_rate=rate)

    def transformer(self, latents: LatentSpecification) -> GatNetworkConfig:
        size = GAT_SIZES[self.size]
        return GatNetworkConfig(
            latents=latents,
            depth=size.depth,
            hidden_size=size.hidden_size,
            num_heads=size.num_heads,
            patch_size=self.patch_size,
            class_size=size.class_size,
        )

    def fit(self, weights: Mapping[str, Tensor], *, codebook_size: int | None) -> GatNetworkConfig:
        """See `Recipe`; one class is taken for none."""
        del codebook_size
        side = isqrt(weights["pos_embed"].shape[1]) * self.patch_size
        num_rows = len(weights["y_embedder.embedding_table.weight"])
        return self.transformer(
            LatentSpecification(
                channels=len(weights[f"final_layers.{NUM_LEVELS - 1}.linear.bias"]) // self.patch_size**2,
                height=side,
                width=side,
                num_classes=num_rows if num_rows > 1 else 0,
            )
        )

    @classmethod
    def from_published(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_published(weights)

    @classmethod
    def to_published(cls, network: BackboneConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(network, GatNetworkConfig)
        return to_published(network, weights)

    def objective(self, latents: LatentSpecification, *, label_dropout: float = 0.0) -> GatObjective:
        """See `Recipe`: styles are guided without a "no class"."""
        del latents
        if label_dropout:
            raise UserError(f"--label-dropout {label_dropout} is not for '{self}'", "Leave it out")
        return GatObjective(
            r1_weight=self.gat.r1_weight,
            r2_weight=self.gat.r2_weight,
            penalty_every=self.gat.penalty_every,
            augment=self.gat.augment,
        )


@final
@dataclass(frozen=True, kw_only=True)
class Maskgit(Recipe):
    """Masked tokens, Chang et al., arXiv:2202.04200, as Besnier & Chen trained it, arXiv:2310.14400.

    They took 300 epochs of batch 512 by AdamW with rate 1e-4, and no averaged weights.
    """

    maskgit: MaskgitConfig = field(default_factory=MaskgitConfig)

    family: ClassVar[str] = "maskgit"
    models: ClassVar[Literal["tokens"]] = "tokens"
    mend: ClassVar[str] = "Train a DiT or SiT on it, or encode with a discrete autoencoder"
    draws: ClassVar[Literal["tokens"]] = "tokens"
    published: ClassVar[Published] = Published(
        adam_beta2=0.96, weight_decay=1e-5, max_grad_norm=1.0, lr_warmup_steps=2500, watch_steps=8
    )
    samplers: ClassVar[dict[str, int]] = {"confidence": 8, "halton": 32}
    sampler: ClassVar[str] = "confidence"
    unadaptable: ClassVar[str] = "codes of two codebooks are no vectors that a map could turn into each other"
    backbone_config: ClassVar[type[MaskTransformerConfig]] = MaskTransformerConfig

    def __str__(self) -> str:
        return f"{self.family}-{self.size}"

    def transformer(self, latents: LatentSpecification) -> MaskTransformerConfig:
        size = MASKGIT_SIZES[self.size]
        return MaskTransformerConfig(
            latents=latents,
            depth=size.depth,
            hidden_size=size.hidden_size,
            num_heads=size.num_heads,
            mlp_size=size.mlp_size,
        )

    def fit(self, weights: Mapping[str, Tensor], *, codebook_size: int | None) -> MaskTransformerConfig:
        """See `Recipe`: codes, mask, classes and "no class" share a table."""
        side = isqrt(weights["pos_emb"].shape[1] - 1)
        num_classes = len(weights["tok_emb.weight"]) - (codebook_size or 0) - 2
        return self.transformer(
            LatentSpecification(channels=codebook_size or 0, height=side, width=side, num_classes=num_classes)
        )

    def objective(self, latents: LatentSpecification, *, label_dropout: float = 0.1) -> MaskgitObjective:
        return MaskgitObjective(
            codebook_size=latents.channels,
            num_classes=latents.num_classes,
            schedule=self.maskgit.schedule,
            label_dropout=label_dropout,
            label_smoothing=self.maskgit.label_smoothing,
            loss_tokens=self.maskgit.loss_tokens,
        )


FAMILIES: dict[str, type[Recipe]] = {family.family: family for family in (Dit, Sit, RepaSit, Gat, Maskgit)}

PARTS: dict[type, str] = {
    ReadingConfig: "reading", DitConfig: "dit", SitConfig: "sit", RepaConfig: "repa", GatConfig: "gat",
    MaskgitConfig: "maskgit",
}  # fmt: skip
"""The fields of recipes, and of `eqvae train`'s configuration, that hold a family's choices."""

NAMES: tuple[str, ...] = (
    *(f"{family}-{size}-{patch}" for family in ("dit", "sit", "repa-sit") for size in SIZES for patch in PATCH_SIZES),
    *(f"gat-{size}-{patch}" for size in GAT_SIZES for patch in PATCH_SIZES),
    *(f"maskgit-{size}" for size in MASKGIT_SIZES),
)
"""All presets."""


def find_recipe(name: str, *choices: FamilyConfig | None) -> Recipe:
    """Read a generator's name and give its family what was chosen; what would change nothing there is refused."""
    if name.lower() not in NAMES:
        raise UserError(f"there is no generator '{name}'", nearest_name(name.lower(), NAMES))
    name = name.lower()
    family = next(family for prefix, family in FAMILIES.items() if name.startswith(f"{prefix}-"))
    size, *patch_size = name.removeprefix(f"{family.family}-").split("-")
    taken: dict[str, Any] = {"patch_size": int(patch_size[0])} if patch_size else {}
    for choice in choices:
        if choice is None:
            continue
        if (part := PARTS[type(choice)]) in {each.name for each in fields(family)}:
            taken[part] = choice
        else:
            _refuse_choice(choice, name)
    return family(size=size, **taken)


def _refuse_choice(choice: FamilyConfig, name: str) -> None:
    """Name the first field of another family's that is not as it always is."""
    for each in fields(choice):
        value = getattr(choice, each.name)
        if value != each.default:
            flag, owner = each.name.replace("_", "-"), choice.owner
            raise UserError(
                f"--{flag} {value} is {owner}'s, and '{name}' is no {owner}", f"Leave it out, or train a {owner}"
            )
