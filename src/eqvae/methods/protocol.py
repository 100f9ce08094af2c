"""The two shapes of a first-stage method: a pair, `L(a(x), D(b(z)))`, and a term, a number for each image.

    @method("mirror")
    class Mirror(Pair):
        \"\"\"`L(x mirrored, D(z mirrored))`.\"\"\"

        def act(self, batch: Batch) -> Drawn:
            return Drawn(image=lambda x: x.flip(-1), latent=lambda z: z.flip(-1))

Fields of the class are the method's parameters. Both draw from the step's own seed, for all processes' images at
once: a resumed run, and one on other processes, draws the same.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, Posterior
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize
from eqvae.runtime.processes import ALONE, Processes
from eqvae.transforms import IDENTITY, Draw

Option = TypeVar("Option")

Action = Callable[[Tensor], Tensor]
"""What happens to images, or to latents: (n, c, h, w) to (n, c, h', w')."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one step does: `weight L(a(x), D(b(z))) + plain_weight L(x, D(z))`."""

    image: Action = IDENTITY
    """a: image to target."""

    latent: Action = IDENTITY
    """b: raw latent, before quantization, to what is decoded."""

    before: Action = IDENTITY
    """Gives the x that is encoded, and that a sees, in place of the batch's."""

    mask: Float[Tensor, "_ 1 h w"] | None = None
    """Of the target: 1 where it counts, 0 where decoded pixels are replaced by the target's; None: all counts."""

    weight: float = 1.0

    plain_weight: float = 0.0

    branch: str = "plain"
    """What the journal calls it."""

    name: str = "identity"
    """What was drawn, as the journal prints it."""

    @classmethod
    def of(cls, draw: Draw) -> "Drawn":
        """EQ-VAE's: tau acts alike on both."""
        return cls(image=draw.tau, latent=draw.tau, before=draw.before, branch=draw.branch, name=str(draw.tau))

    def comparisons(self) -> tuple[tuple[float, "Drawn"], ...]:
        """What is decoded, and how much each weighs."""
        plain = ((self.plain_weight, Drawn()),) if self.plain_weight > 0 else ()
        return ((self.weight, self), *plain)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a method draws for: this process's images of a micro-batch, and randomness that all processes share."""

    x: Float[Tensor, "n k h w"]
    stride: int
    latent_channels: int
    generator: torch.Generator
    processes: Processes = ALONE
    part: nn.Module | None = None
    """What the method's `build` gave."""

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latent, in cells."""
        return self.x.shape[-2] // self.stride, self.x.shape[-1] // self.stride

    def rand(self) -> float:
        """A number in [0, 1) for the whole step."""
        return torch.rand((), generator=self.generator).item()

    def choose(self, options: Sequence[Option]) -> Option:
        """One of some options for the whole step, all as probable."""
        return options[int(self.rand() * len(options))]

    def rand_each(self, *shape: int) -> Float[Tensor, "n ..."]:
        """Uniform numbers in [0, 1) for each image."""
        return self._own(torch.rand((self.num_images, *shape), generator=self.generator))

    def randn_each(self, *shape: int) -> Float[Tensor, "n ..."]:
        """Standard normal numbers for each image."""
        return self._own(torch.randn((self.num_images, *shape), generator=self.generator))

    def latent_noise(self) -> Float[Tensor, "n c h w"]:
        """Standard normal numbers in the latent's shape."""
        return self.randn_each(self.latent_channels, *self.latent_size)

    def deviation(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        """Standard deviation of a step's latents, of all processes, without gradient."""
        values = z.detach().float()
        first, second = self.processes.average(torch.stack([values.mean(), values.square().mean()]))
        return (second - first.square()).clamp(min=0.0).sqrt().to(z.dtype)

    @property
    def num_images(self) -> int:
        """How many images the micro-batch has in all processes."""
        return len(self.x) * self.processes.count

    def _own(self, rows: Tensor) -> Tensor:
        return rows[len(self.x) * self.processes.rank :][: len(self.x)].to(self.x.device)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a term sees of a step."""

    autoencoder: Autoencoder
    x: Float[Tensor, "n k h w"]
    posterior: Posterior
    """E(x)."""
    z: Float[Tensor, "n c h2 w2"]
    """Drawn from it, raw, before the pair acts."""
    drawn: Drawn
    """What the term drew."""
    part: nn.Module | None
    """What the term's `build` gave."""
    processes: Processes = ALONE


class Method(ABC):
    """What pairs and terms have in common: a name, parameters, and what they learn or look at."""

    name: ClassVar[str]
    """Under which `method` registered it."""

    wants_kl: ClassVar[bool] = True
    """False where the source trains without the divergence: `--kl-weight` is then 0 unless it is given."""

    not_discrete: ClassVar[str] = ""
    """Why it makes no sense before quantization; empty where it does."""

    limits: ClassVar[dict[str, tuple[float, float]]] = {}
    """Smallest and largest value of parameters."""

    def __post_init__(self) -> None:
        """Check the parameters."""
        for name, value in self.parameters().items():
            low, high = {"p": (0.0, 1.0)}.get(name) or self.limits.get(name, (-math.inf, math.inf))
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(each, int | float) and not low <= each <= high for each in values):
                raise UserError(f"--method {self.name}({name}={show(value)})", f"It must lie in [{low:g}, {high:g}]")
        low, high = (self.parameters().get(name, 0) for name in ("low", "high"))
        if low > high:
            given = f"low={show(low)}, high={show(high)}"
            raise UserError(f"--method {self.name}({given}) leaves nothing between", "Give low <= high")

    def parameters(self) -> dict[str, Any]:
        """Its parameters by name."""
        own: Any = self
        return {each.name: getattr(self, each.name) for each in fields(own) if each.init}

    def __str__(self) -> str:
        """The method with its parameters, as `--method` reads it; the base class's defaults are left out."""
        own: Any = self
        common = {("p", 1.0), ("adaptive", False)}
        default = {(each.name, each.default) for each in fields(own) if each.name in ("p", "adaptive")} & common
        values = {name: value for name, value in self.parameters().items() if (name, value) not in default}
        given = ", ".join(f"{name}={show(value)}" for name, value in values.items())
        return f"{show(self.name)}({given})" if given else show(self.name)

    def check(self, autoencoder: Autoencoder, *, image_size: ImageSize, num_images: int) -> None:
        """Refuse an autoencoder, or `num_images` of a process's micro-batch, that the method can't work with."""
        del image_size, num_images
        if self.not_discrete and isinstance(autoencoder, DiscreteAutoencoder):
            raise UserError(
                f"--method {self.name} makes no sense for '{autoencoder.name}', which is discrete: {self.not_discrete}",
                "Use a continuous autoencoder, or another method",
            )

    def check_rgb(self, autoencoder: Autoencoder) -> None:
        """Refuse other channels than red, green and blue, for a method that is about colours."""
        if autoencoder.image_channels != 3:
            raise UserError(
                f"--method {self} is for red, green and blue, and '{autoencoder.name}' has images of "
                f"{autoencoder.image_channels} channel{'' if autoencoder.image_channels == 1 else 's'}",
                "Use another method",
            )

    def build(self, autoencoder: Autoencoder, *, image_size_px: int) -> nn.Module | None:
        """Make what is learned beside the autoencoder, and the frozen networks that it looks through."""
        del autoencoder, image_size_px
        return None


@dataclass(frozen=True, kw_only=True)
class Pair(Method):
    """`L(a(x), D(b(z)))`: what happens to images and to latents, drawn once for a micro-batch."""

    p: float = 1.0
    """Probability that a step does it; otherwise Equation 1."""

    @abstractmethod
    def act(self, batch: Batch) -> Drawn:
        """Draw what happens to images and to latents."""

    def draw(self, batch: Batch) -> Drawn:
        """Act with probability p."""
        if self.p < 1.0 and batch.rand() >= self.p:
            return Drawn()
        drawn = self.act(batch)
        return replace(drawn, branch=self.name) if drawn.branch == "plain" else drawn

    def smallest_side(self, latent_side: int) -> int:
        """How few cells a side of the decoded latent can have."""
        return latent_side


@dataclass(frozen=True, kw_only=True)
class Term(Method):
    """A number for each image, added to the objective with a weight."""

    default_weight: ClassVar[float]
    """Of the number beside L, which sums over an image's values as LDM does."""

    trains_decoder: ClassVar[bool] = False
    """Whether it has a gradient where the encoder is frozen."""

    adaptive: bool = False
    """Multiply the weight by `|grad L| / |grad term|` at the encoder's last layer."""

    @abstractmethod
    def value(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """Compute the number of each image."""

    def draw(self, batch: Batch) -> Drawn:
        """Draw what the term needs; its `before` counts only where there is no pair."""
        del batch
        return Drawn()


def show(value: Any) -> str:
    """Print a parameter's value as `--method` reads it: the same value, and no longer than it has to be."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return text if re.fullmatch(r"[^\s()\[\],:+=\"]+|[^\s()\[\],+=\"]+\.py:\w+", text) else f'"{text}"'
