"""What a recipe is: a family of generators at one of its sizes, and what it is trained for and with."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.diffusion import DitConfig
from eqvae.generators.gat import GatConfig, GatObjective
from eqvae.generators.gat_transformer import GatGenerator, GatNetworkConfig
from eqvae.generators.interpolant import Interpolant, SitConfig
from eqvae.generators.maskgit import MaskgitConfig
from eqvae.generators.maskgit_transformer import MaskTransformer, MaskTransformerConfig
from eqvae.generators.protocol import LatentSpecification, Objective, ReadingConfig
from eqvae.generators.repa import RepaConfig
from eqvae.generators.transformer import Transformer, TransformerConfig

Backbone = Transformer | GatGenerator | MaskTransformer
"""The network of a generator of latents, or of tokens."""

BackboneConfig = TransformerConfig | GatNetworkConfig | MaskTransformerConfig

FamilyConfig = ReadingConfig | DitConfig | SitConfig | RepaConfig | GatConfig | MaskgitConfig
"""What a user may choose of a family; SiT takes the first three, REPA the first four, GAT the first and its own."""

PUBLISHED_LATENTS = LatentSpecification(channels=4, height=32, width=32, num_classes=1000)
"""ImageNet at 256 px through SD-VAE: what `Size.num_parameters` refers to."""


@dataclass(frozen=True)
class Size:
    """A size of DiT's transformer, which SiT and REPA share."""

    depth: int
    hidden_size: int
    num_heads: int
    num_parameters: int
    """With patch size 2, `PUBLISHED_LATENTS` and learned variances; Table 4 of arXiv:2212.09748 rounds them."""
    gflops: float
    """Multiply-adds of one forward pass under the same conditions, 1e9."""


# fmt: off
SIZES = {
    #          depth  width  heads  parameters   Gflops
    "ti": Size(6,     192,   3,     4_409_888,   0.83),
    "s":  Size(12,    384,   6,     32_963_360,  6.06),
    "b":  Size(12,    768,   12,    130_512_416, 23.01),
    "l":  Size(24,    1024,  16,    458_102_816, 80.71),
    "xl": Size(28,    1152,  16,    675_129_632, 118.64),
}
# fmt: on


class Published(NamedTuple):
    """Values of `eqvae train` that were published with a family, where families differ; `watch_steps` is ours."""

    learning_rate: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    lr_warmup_steps: int = 0
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    watch_steps: int = 50


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A family at one of its sizes, with what a user chose of it."""

    size: str

    family: ClassVar[str]
    """How its names begin."""

    models: ClassVar[Literal["moments", "tokens"]]
    """The kind of latent cache that it is trained on."""

    mend: ClassVar[str]
    """What to do with a cache of the other kind."""

    published: ClassVar[Published]

    samplers: ClassVar[dict[str, int]]
    """What it can be sampled by, each with its published number of steps."""

    sampler: ClassVar[str]
    """The published one."""

    backbone_config: ClassVar[type[TransformerConfig] | type[GatNetworkConfig] | type[MaskTransformerConfig]]

    draws: ClassVar[Literal["process", "tokens", "pass"]]
    """How an image comes about: by steps from noise, by tokens that are filled, or in one pass."""

    unadaptable: ClassVar[str] = ""
    """Why it can't go on with another autoencoder's latents; empty where it can."""

    @abstractmethod
    def __str__(self) -> str:
        """The name that `find_recipe` reads."""

    @classmethod
    def check_sampler(cls, sampler: str | None, flag: str, recipe: str) -> None:
        """Refuse one of another kind of generator; None is the published one."""
        if sampler is not None and sampler not in cls.samplers:
            raise UserError(f"{flag} {sampler} is not for '{recipe}'", f"Use {' or '.join(cls.samplers)}")

    def check_watch(self, num_steps: int | None, sampler: str | None) -> None:
        """Refuse what samples during its training can't be drawn by."""
        self.check_sampler(sampler, "--watch-sampler", str(self))
        if sampler == "dopri5":
            raise UserError("--watch-sampler dopri5 takes no number of steps", "Use heun")
        if self.draws == "pass" and num_steps not in (None, 1):
            raise UserError(f"--watch-steps {num_steps} is not for '{self}'", "It draws in one pass")
        if self.draws != "pass" and num_steps == 1:
            raise UserError("--watch-steps is 1", "It must be in 2 ... 1000")

    @abstractmethod
    def transformer(self, latents: LatentSpecification) -> BackboneConfig:
        """Describe the network."""

    @abstractmethod
    def objective(self, latents: LatentSpecification, *, label_dropout: float = 0.1) -> Objective | GatObjective:
        """Build what it is trained for."""

    def check_shapes(self, latents: Sequence[LatentSpecification], source: str, *, has_teacher: bool) -> None:
        """Refuse several shapes where network or teacher know one, and those that are no whole number of patches."""
        if len(latents) > 1 and (self.draws != "process" or has_teacher):
            raise UserError(
                f"'{self}' models latents of one shape, and '{source}' holds {len(latents)}",
                "Train a DiT or SiT on it, or encode with one --image-size",
            )
        for each in latents:
            self.transformer(each)

    def values(self) -> Published:
        """Say what `eqvae train` takes where its user chose nothing."""
        return self.published

    @abstractmethod
    def fit(self, weights: Mapping[str, Tensor], *, codebook_size: int | None) -> BackboneConfig:
        """Describe the network that published weights are of: what a name leaves open follows from their shapes."""

    @classmethod
    def from_published(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take of the published code's weights what the network here has."""
        return dict(weights)

    @classmethod
    def to_published(cls, network: BackboneConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make of a network's weights those that the published code loads."""
        del network
        return dict(weights)

    @property
    def interpolant(self) -> Interpolant | None:
        """The path between data and noise; None for a diffusion and for tokens."""
        return None
