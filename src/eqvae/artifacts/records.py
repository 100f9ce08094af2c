"""Records that a command leaves for others: pictures, the card of an exported model, what a conversion wrote."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eqvae.artifacts.files import read_tensors, write_json, write_tensors
from eqvae.artifacts.names import MODEL_CARD
from eqvae.artifacts.parsing import parse_json
from eqvae.artifacts.typed import to_type
from eqvae.errors import UserError, printable


def to_uint8(x: Float[Tensor, "n k h w"]) -> UInt8[Tensor, "n k h w"]:
    """Round images in [-1, 1] to 8 bits, as files and metrics see them; NaN would become black."""
    if x.device.type != "meta" and not bool(x.isfinite().all()):
        raise UserError(
            "decoded pictures hold NaN or infinite values: the autoencoder or the generator has diverged",
            "Take an earlier checkpoint, or try --precision fp32",
        )
    return ((x.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a report draws of one autoencoder: the same few images, their latents and their transformed decodings.

    Rows of the transformed pictures are images; the second axis runs over `transforms`.
    """

    images: UInt8[Tensor, "n 3 h w"]
    """x."""

    latents: Float[Tensor, "n c h2 w2"]
    """E(x), raw, posterior mean."""

    reconstructions: UInt8[Tensor, "n 3 h w"]
    """D(E(x))."""

    encoded_transformed: tuple[UInt8[Tensor, "n 3 _ _"], ...]
    """D(E(tau o x)), one tensor for each transform."""

    decoded_transformed: tuple[UInt8[Tensor, "n 3 _ _"], ...]
    """D(tau o E(x)), one tensor for each transform."""

    transforms: tuple[str, ...]
    """Names of the transforms, as figures print them, e.g. "s = 0.5" and "90 degrees"."""

    turned: UInt8[Tensor, "2 angles 3 h w"] | None = None
    """The first image turned once around, tau o x, and D(tau o E(x)) for the same angles; None: not asked for."""

    shows: str = ""
    """Which channels of several are the pictures' colours; empty where all are seen."""

    @property
    def input_name(self) -> str:
        """What x is called above its pictures."""
        return f"input, {self.shows}" if self.shows else "input"

    def write(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {"images": self.images, "latents": self.latents, "reconstructions": self.reconstructions}
        for index, (encoded, decoded) in enumerate(
            zip(self.encoded_transformed, self.decoded_transformed, strict=True)
        ):
            tensors |= {f"encoded_transformed.{index}": encoded, f"decoded_transformed.{index}": decoded}
        if self.turned is not None:
            tensors["turned"] = self.turned
        note = {"transforms": json.dumps(self.transforms)}
        write_tensors(path, tensors, note | ({"shows": self.shows} if self.shows else {}))

    @classmethod
    def read(cls, path: Path) -> "Pictures":
        """Read what `write` wrote."""
        tensors, metadata = read_tensors(path)
        try:
            names = to_type(tuple[str, ...], parse_json(metadata["transforms"]), where="transforms")
            found = cls(
                images=tensors["images"],
                latents=tensors["latents"],
                reconstructions=tensors["reconstructions"],
                encoded_transformed=tuple(tensors[f"encoded_transformed.{index}"] for index in range(len(names))),
                decoded_transformed=tuple(tensors[f"decoded_transformed.{index}"] for index in range(len(names))),
                transforms=names,
                turned=tensors.get("turned"),
                shows=printable(metadata.get("shows", "")),
            )
            found.check()
        except (KeyError, ValueError, RecursionError) as error:
            raise UserError(f"'{path}' holds no pictures ({error})", "Run 'eqvae evaluate' again") from None
        return found

    def check(self) -> None:
        """Hold the tensors against each other; a ValueError names one that does not fit."""
        pictures = (self.images, self.reconstructions, *self.encoded_transformed, *self.decoded_transformed)
        for each in pictures:
            if each.dtype != torch.uint8 or each.ndim != 4 or each.shape[1] != 3 or len(each) != len(self.images):
                raise ValueError(f"pictures of shape {tuple(each.shape)} and type {each.dtype}")
        turned = self.turned
        if turned is not None and (
            turned.dtype != torch.uint8
            or (len(turned), turned.shape[2:]) != (2, self.images.shape[1:])
            or 0 in turned.shape
        ):
            raise ValueError(f"turned pictures of shape {tuple(turned.shape)} and type {turned.dtype}")
        latents = self.latents
        if not latents.is_floating_point() or latents.ndim != 4 or len(latents) != len(self.images):
            raise ValueError(f"latents of shape {tuple(latents.shape)} and type {latents.dtype}")
        if not bool(latents.isfinite().all()) or any(0 in each.shape for each in (*pictures, latents)):
            raise ValueError("latents that are not finite, or nothing")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """`eqvae.json` beside an exported autoencoder: where it comes from and what was measured on it."""

    base: str
    """The autoencoder that training started from: preset, hub id or path."""

    base_fingerprint: str
    """Digest of its weights."""

    fingerprint: str
    """Digest of the weights beside this file."""

    data: str
    """What it was trained on."""

    num_steps: int
    """Optimizer steps."""

    recipe: dict[str, Any]
    """The complete configuration of the run."""

    latent_mean: tuple[float, ...]
    """Per channel, raw latents."""

    latent_std: tuple[float, ...]
    """Per channel, raw latents."""

    figures: dict[str, float]
    """Measured at the end of the run; `before_` marks the base."""

    eqvae_version: str

    def write(self, folder: Path) -> None:
        """Write into the model's folder."""
        write_json(folder / MODEL_CARD, self)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion between published layouts wrote."""

    path: Path

    advice: tuple[str, ...]
    """What whoever loads it has to know or to set, one line each."""

    keys: str
    """How many tensors there are, and how many of them have the names that they had."""

    largest_difference: float
    """Between outputs of the source and of what was written, loaded again, for the same inputs."""
