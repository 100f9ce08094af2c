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

from eqvae.artifacts.files import load_strictly, read_json, read_tensors, replace_folder, write_json, write_tensors
from eqvae.artifacts.names import GENERATOR, GENERATOR_CARD, weights_name
from eqvae.errors import UserError
from eqvae.generators.families import FAMILIES
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.maskgit import Schedule
from eqvae.generators.recipes import Backbone, BackboneConfig, Recipe

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

    class_names: tuple[str, ...] | None

    num_steps: int
    """Optimizer steps done."""

    eqvae_version: str

    schedule: Schedule | None = None
    """MaskGIT's, of training; None for generators of latents."""

    encoder_fingerprint: str | None = None
    """Digest of the encoder's weights, which training the decoder further leaves alone; None in older cards."""

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
        fields = {"family": next(name for name in FAMILIES if plain["recipe"].startswith(f"{name}-")), **plain}
        fields["transformer"] = FAMILIES[fields["family"]].backbone_config.from_plain(fields["transformer"])
        fields["interpolant"] = Interpolant(**fields["interpolant"]) if fields["interpolant"] else None
        for name in ("shift", "scale", "class_names"):
            fields[name] = tuple(fields[name]) if fields[name] is not None else None
        return cls(**fields)

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
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise UserError(f"'{path}' describes no generator ({error})", "Write it again") from None


def build_generator(card: GeneratorCard, weights: Mapping[str, Tensor], *, source: str) -> Generator:
    """Put weights and card together."""
    return Generator(card=card, transformer=load_transformer(card.transformer, weights, source=source))


def load_transformer(config: BackboneConfig, weights: Mapping[str, Tensor], *, source: str) -> Backbone:
    """Build a transformer with given weights; every name and shape has to fit."""
    with torch.device("meta"):
        transformer = config.build()
    load_strictly(
        transformer,
        weights,
        source=source,
        model_name="the generator",
        mend="Are recipe, latents and number of classes those of the weights?",
    )
    return transformer.eval()
