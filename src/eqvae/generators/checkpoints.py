"""Generators on disk: weights under the published models' names, and all that sampling has to know of them.

generator/generator.json      the record below
generator/ema.safetensors     averaged weights, which are sampled from
generator/model.safetensors   the weights in training
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.artifacts.building import bounded_building
from eqvae.artifacts.files import (
    check_finite,
    load_strictly,
    read_json,
    read_tensors,
    replace_folder,
    write_json,
    write_tensors,
)
from eqvae.artifacts.names import GENERATOR, GENERATOR_CARD, weights_name
from eqvae.artifacts.typed import to_record
from eqvae.errors import UserError
from eqvae.generators.families import FAMILIES
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.maskgit import Schedule
from eqvae.generators.recipes import Backbone, BackboneConfig, Recipe
from eqvae.images.sizes import ImageSize

Weights = Literal["ema", "model"]
"""Averaged, or in training."""


@dataclass(frozen=True, kw_only=True)
class GeneratorCard:
    """What was trained, on which latents, and how its output becomes pictures."""

    family: str
    """One of `FAMILIES`: what the transformer is."""

    recipe: str
    """For example `dit-b-2`."""

    transformer: BackboneConfig

    interpolant: Interpolant | None
    """SiT's path and prediction; None for DiT's diffusion, GAT and MaskGIT."""

    shift: tuple[float, ...]
    """Per channel: `raw latent = normalized * scale + shift`; empty for tokens."""

    scale: tuple[float, ...]
    """Per channel."""

    autoencoder: str
    """The decoder: preset, hub id or path, as `eqvae encode` was given it."""

    autoencoder_fingerprint: str
    """Digest of its weights, all of them."""

    image_size_px: int
    """Height of its pictures."""

    class_names: tuple[str, ...] | None

    num_steps: int
    """Optimizer steps done."""

    eqvae_version: str

    schedule: Schedule | None = None
    """MaskGIT's, of training; None for generators of latents."""

    encoder_fingerprint: str | None = None
    """Digest of the encoder's weights, which training the decoder further leaves alone; None in older cards."""

    shapes: tuple[tuple[int, ...], ...] = ()
    """Height and width, in cells, of all latents that it was trained on; empty: those of its transformer alone."""

    label_dropout: float | None = None
    """Share of the labels that were left out in training; None in older cards."""

    def __post_init__(self) -> None:
        """Hold shift and scale against the latents that they are of."""
        channels = 0 if self.models_tokens else self.transformer.latents.channels
        if len(self.shift) != channels or len(self.scale) != channels or not all(each > 0 for each in self.scale):
            raise ValueError(f"shift {self.shift} and scale {self.scale} are not of {channels} channels")
        if not 0 < self.image_size_px < 2**20 or self.num_steps < 0:
            raise ValueError(f"image_size_px is {self.image_size_px}, and num_steps {self.num_steps}")
        if any(len(shape) != 2 or not all(0 < side < 2**20 for side in shape) for shape in self.shapes):
            raise ValueError("a shape has a height and a width")

    @property
    def stride(self) -> int:
        """Pixels per latent cell."""
        return self.image_size_px // self.transformer.latents.height

    def image_sizes(self) -> list[ImageSize]:
        """List the sizes of pictures that it was trained on, its own first."""
        latents = self.transformer.latents
        own = ImageSize(self.image_size_px, self.image_size_px * latents.width // latents.height)
        others = [ImageSize(height * self.stride, width * self.stride) for height, width in self.shapes]
        return [own, *(size for size in others if size != own)]

    @property
    def kind(self) -> type[Recipe]:
        """The family itself."""
        return FAMILIES[self.family]

    @property
    def models_tokens(self) -> bool:
        """Whether it draws tokens, not latents."""
        return self.kind.models == "tokens"

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "GeneratorCard":
        """Read what JSON holds; a card from before `family` stood in it says the same with the recipe's name."""
        recipe, family = str(plain.get("recipe")), plain.get("family")
        family = next((name for name in FAMILIES if recipe.startswith(f"{name}-")), None) if family is None else family
        if family not in FAMILIES:
            raise ValueError(f"its recipe is '{recipe[:50]}'")
        config = to_record(FAMILIES[family].backbone_config, plain.get("transformer"), where="transformer")
        return to_record(cls, {**plain, "family": family, "transformer": config})

    def denormalize(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Turn what the generator drew into what the decoder takes."""
        shift, scale = z.new_tensor(self.shift), z.new_tensor(self.scale)
        return z * scale[:, None, None] + shift[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A generator to sample from."""

    card: GeneratorCard

    transformer: Backbone


def write_generator(folder: Path, card: GeneratorCard, weights: Mapping[Weights, Mapping[str, Tensor]]) -> None:
    """Write weights and card; a former generator is replaced as a whole."""

    def fill(part: Path) -> None:
        for which, state in weights.items():
            check_finite(
                state, source="The trained generator", mend="Take an earlier checkpoint, or a lower --learning-rate"
            )
            write_tensors(part / weights_name(which), state, digest=True)
        write_json(part / GENERATOR_CARD, card)

    replace_folder(folder / GENERATOR, fill)


def read_generator(run: Path, which: Weights = "ema") -> Generator:
    """Read a generator to sample from."""
    card, path = read_card(run), run / GENERATOR / weights_name(which)
    return build_generator(card, read_tensors(path)[0], source=str(path))


def read_card(run: Path) -> GeneratorCard:
    """Read what a generator is."""
    path = run / GENERATOR / GENERATOR_CARD
    if not path.is_file():
        mend = "Train it first, or wait for its first samples" if run.is_dir() else "Check the path"
        raise UserError(f"'{run}' holds no trained generator", mend)
    try:
        return GeneratorCard.from_plain(read_json(path))
    except (TypeError, ValueError, ArithmeticError, UserError) as error:
        raise UserError(f"'{path}' describes no generator ({error})", "Write it again") from None


def build_generator(card: GeneratorCard, weights: Mapping[str, Tensor], *, source: str) -> Generator:
    """Put weights and card together."""
    return Generator(card=card, transformer=load_transformer(card.transformer, weights, source=source))


def load_transformer(config: BackboneConfig, weights: Mapping[str, Tensor], *, source: str) -> Backbone:
    """Build a transformer with given weights; every name and shape has to fit."""
    try:
        with torch.device("meta"), bounded_building():
            transformer = config.build()
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"'{source}' is of a generator that can't be built ({what})", "Write it again") from None
    load_strictly(
        transformer,
        weights,
        source=source,
        model_name="the generator",
        mend="Are recipe, latents and number of classes those of the weights?",
    )
    return transformer.eval()
