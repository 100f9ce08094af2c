"""A generator's folder: weights under the published models' names, and all that sampling has to know of them.

generator/generator.json      the record below
generator/ema.safetensors     averaged weights, which are sampled from
generator/model.safetensors   the weights in training
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from eqvae.artifacts import read_json, replace_folder, write_json, write_tensors
from eqvae.errors import UserError
from eqvae.generators.checkpoints import Backbone, BackboneConfig, load_generator, read_generator_weights
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.maskgit_transformer import MaskTransformerConfig
from eqvae.generators.masking import Schedule
from eqvae.generators.transformer import TransformerConfig

GENERATOR = "generator"
CARD = "generator.json"

Weights = Literal["ema", "model"]


@dataclass(frozen=True, kw_only=True)
class GeneratorCard:
    """What was trained, on which latents, and how its output becomes pictures."""

    recipe: str
    """For example `dit-b-2`."""

    transformer: BackboneConfig

    interpolant: Interpolant | None
    """SiT's path and prediction; None for DiT's diffusion and MaskGIT."""

    shift: tuple[float, ...]
    """Per channel: `raw latent = normalized * scale + shift`; empty for tokens."""

    scale: tuple[float, ...]
    """Per channel."""

    autoencoder: str
    """The decoder: preset, hub id or path, as `eqvae encode` was given it."""

    autoencoder_fingerprint: str
    """Digest of its weights."""

    image_size_px: int

    class_names: tuple[str, ...] | None

    num_steps: int
    """Optimizer steps done."""

    eqvae_version: str

    schedule: Schedule | None = None
    """MaskGIT's, of training; None for generators of latents."""

    @property
    def models_tokens(self) -> bool:
        """Whether it draws tokens, not latents."""
        return isinstance(self.transformer, MaskTransformerConfig)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "GeneratorCard":
        """Read what JSON holds."""
        fields = dict(plain)
        kind = MaskTransformerConfig if "mlp_size" in fields["transformer"] else TransformerConfig
        fields["transformer"] = kind.from_plain(fields["transformer"])
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
            write_tensors(part / f"{which}.safetensors", state)
        write_json(part / CARD, card)

    replace_folder(folder / GENERATOR, fill)


def read_generator(run: Path, which: Weights = "ema") -> Generator:
    """Read a generator to sample from."""
    folder = run / GENERATOR
    if not (folder / CARD).is_file():
        mend = "Train it first, or wait for its first samples" if run.is_dir() else "Check the path"
        raise UserError(f"'{run}' holds no trained generator", mend)
    try:
        card = GeneratorCard.from_plain(read_json(folder / CARD))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{folder / CARD}' describes no generator ({error})", "Write it again") from None
    path = folder / f"{which}.safetensors"
    return build_generator(card, read_generator_weights(path), source=str(path))


def build_generator(card: GeneratorCard, weights: Mapping[str, Tensor], *, source: str) -> Generator:
    """Put weights and card together."""
    return Generator(card=card, transformer=load_generator(card.transformer, weights, source=source))
