"""Generators on disk: an official file of weights, read without running anything in it, and a run's own folder.

generator/generator.json      the record below
generator/ema.safetensors     averaged weights, under the published models' names; they are sampled from
generator/model.safetensors   the weights in training
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.artifacts import (
    GENERATOR,
    GENERATOR_CARD,
    load_strictly,
    read_json,
    read_tensors,
    replace_folder,
    weights_name,
    write_json,
    write_tensors,
)
from eqvae.errors import UserError
from eqvae.generators.families import FAMILIES, Backbone, BackboneConfig, Recipe
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.maskgit import Schedule

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
            write_tensors(part / weights_name(which), state)
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


# Official files -----------------------------------------------------------------------------------------------------

_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before names."""


class _Inert:
    """Stands for the command line (argparse's Namespace) that training codes save beside weights; it does nothing."""


_INERT_GLOBALS: list[Any] = [(_Inert, "argparse.Namespace")]


def read_official(path: Path) -> dict[Weights, dict[str, Tensor]]:
    """Read an official file of DiT, SiT, REPA or MaskGIT: a state dict, or a training checkpoint with one or two.

    Where there is one set of weights only, it is `ema`, which is sampled from.
    """
    content: Any = read_tensors(path)[0] if path.suffix == ".safetensors" else _read_pickle(path)
    content = content if isinstance(content, Mapping) else {}
    found: dict[Weights, dict[str, Tensor]] = {}
    names: tuple[tuple[str, Weights], ...] = (("model", "model"), ("model_state_dict", "ema"), ("ema", "ema"))
    for name, which in names:
        if isinstance(content.get(name), Mapping):
            found[which] = _named_tensors(content[name])
    if not found:
        found["ema"] = _named_tensors(content)
    if "ema" not in found:
        found["ema"] = found.pop("model")
    if not all(found.values()):
        raise UserError(f"'{path}' holds no named weights", "Give a state dict or a training checkpoint")
    if "cls_emb.weight" in found["ema"]:
        raise UserError(
            f"'{path}' is of Halton-MaskGIT's network, which is not MaskGIT's of 2023",
            "Give one of valeoai/Maskgit-pytorch, v1.0; the Halton order samples from it too",
        )
    return found


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_INERT_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "Check the path") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"'{path}' is truncated or holds more than weights, and was refused: nothing in it was run",
            "Use a .safetensors file of the same weights",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError):
        raise UserError(f"'{path}' is truncated or no weight file", "Fetch it again") from None


def _named_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the wrappers off the names, and let the blocks after REPA's projector count on, as in its later files."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if isinstance(tensor, Tensor):
            named[name] = tensor.float()
    encoder_depth = len({name.split(".")[1] for name in named if name.startswith("blocks.")})
    for name in [name for name in named if name.startswith("decoder_blocks.")]:
        _, index, rest = name.split(".", 2)
        named[f"blocks.{int(index) + encoder_depth}.{rest}"] = named.pop(name)
    return named
