"""Official files of DiT, SiT, REPA, GAT and MaskGIT, which torch.save wrote: read without running anything in them.

A file holds a state dict, or what a training code keeps: `model`, `ema`, `opt`, `args` (DiT, fast-DiT, SiT, REPA),
`generator`, `ema` (GAT), or `model_state_dict` (MaskGIT). Parameters have the names that they have here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqvae.artifacts.files import check_finite, read_tensors, write_atomically
from eqvae.artifacts.names import GENERATOR, weights_name
from eqvae.artifacts.typed import to_type
from eqvae.artifacts.weights import WhichWeights, choose_set, describe_choice, find_sets, plain_names, read_named
from eqvae.autoencoders.factors import Normalization
from eqvae.autoencoders.notes import NOTE, read_note
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder
from eqvae.errors import UserError
from eqvae.generators.checkpoints import GeneratorCard, Weights, load_transformer, read_card
from eqvae.generators.recipes import Backbone, Recipe
from eqvae.runtime.journal import installed_version, say_once

_ANCHORS = (
    ("x_embedder.proj.weight", "final_layer.linear.weight"),
    ("tok_emb.weight", "pos_emb"),
    ("latent_embedder.0.weight", "pos_embed"),
)
"""Names that every DiT, SiT or REPA has, every MaskGIT, and every GAT."""


def read_official(path: Path, which: WhichWeights | None = None) -> dict[Weights, dict[str, Tensor]]:
    """Read an official file of DiT, SiT, REPA, GAT or MaskGIT: a state dict, or a training checkpoint with one or two.

    Where there is one set of weights only, or one was asked for, it is `ema`, which is sampled from.
    """
    named = read_named(path)
    if any(name.split(".")[-2:] == ["cls_emb", "weight"] for name in named.getters):
        raise UserError(
            f"'{path}' is of Halton-MaskGIT's network, which is not MaskGIT's of 2023",
            "Give one of valeoai/Maskgit-pytorch, v1.0; the Halton order samples from it too",
        )
    sets = [each for anchors in _ANCHORS for each in find_sets(named, anchors)]
    if not sets:
        return {"ema": _count_on(named.take(plain_names(named)))}
    chosen, other = choose_set(named, sets, which)
    found: dict[Weights, dict[str, Tensor]] = {"ema": _count_on(named.take(chosen.names))}
    if which is not None:
        return found
    if other is not None:
        found["model"] = _count_on(named.take(choose_set(named, sets, "raw")[0].names))
    if (line := describe_choice(named, chosen, other, takes_both=True)) is not None:
        say_once(line)
    return found


def _count_on(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let the blocks after REPA's projector count on, as in its later files."""
    encoder_depth = len({name.split(".")[1] for name in named if name.startswith("blocks.")})
    for name in [name for name in named if name.startswith("decoder_blocks.")]:
        _, index, rest = name.split(".", 2)
        named[f"blocks.{int(index) + encoder_depth}.{rest}"] = named.pop(name)
    return named


def describe_official(
    weights: Mapping[Weights, Mapping[str, Tensor]],
    recipe: Recipe,
    autoencoder: Autoencoder,
    *,
    shift: tuple[float, ...],
    scale: tuple[float, ...],
    source: str,
) -> GeneratorCard:
    """Say what an official file's weights are: classes, cells and options follow from them, the rest is given."""
    codebook_size = autoencoder.codebook_size if isinstance(autoencoder, DiscreteAutoencoder) else None
    if (codebook_size is not None) != (recipe.models == "tokens"):
        made = "latents" if codebook_size is None else "tokens"
        raise UserError(f"'{recipe}' does not model the {made} of '{autoencoder.name}'", "Choose another --autoencoder")
    try:
        transformer = recipe.fit(weights["ema"], codebook_size=codebook_size)
    except (KeyError, IndexError, ValueError, TypeError):  # a number in the place of a table has no length
        raise UserError(f"'{source}' holds no weights of a '{recipe}'", "Choose another --recipe") from None
    latents = transformer.latents
    if codebook_size is None and latents.channels != autoencoder.latent_channels:
        raise UserError(
            f"'{source}' models latents of {latents.channels} channels, and '{autoencoder.name}' has "
            f"{autoencoder.latent_channels}",
            "Choose another --autoencoder",
        )
    for state in weights.values():
        load_transformer(transformer, state, source=source)
    return GeneratorCard(
        family=recipe.family,
        recipe=str(recipe),
        transformer=transformer,
        interpolant=recipe.interpolant,
        shift=shift,
        scale=scale,
        autoencoder=autoencoder.name,
        autoencoder_fingerprint=autoencoder.fingerprint(),
        encoder_fingerprint=autoencoder.encoder_fingerprint(),
        image_size_px=latents.height * autoencoder.stride,
        class_names=None,
        num_steps=0,
        eqvae_version=installed_version("eqvae") or "unknown",
        schedule="arccos" if codebook_size is not None else None,
    )


def read_noted_normalization(path: Path, num_channels: int) -> Normalization | None:
    """Read how `write_official` notes that latents were normalized; None where there is no note."""
    note = read_note(path)
    if not {"shift", "scale"} <= note.keys():
        return None
    try:
        shift, scale = (to_type(tuple[float, ...], note[name], where=name) for name in ("shift", "scale"))
    except ValueError as error:
        raise UserError(f"The note in '{path}' is damaged ({error})", "Give --normalization") from None
    if not len(shift) == len(scale) == num_channels or min(scale) <= 0:
        raise UserError(
            f"'{path}' notes the shift of {len(shift)} channels and the scale of {len(scale)}, the autoencoder has "
            f"{num_channels}",
            "Choose another --autoencoder, or give --normalization",
        )
    return Normalization(shift, scale)


def write_official(run: Path, path: Path) -> GeneratorCard:
    """Write a run's weights as the published codes load them: a state dict, or `ema` and `model` where both are kept.

    Beside these two a note says how latents were normalized. MaskGIT's code expects `model_state_dict`.
    """
    card, kinds = read_card(run), ("ema", "model")
    files = {kind: run / GENERATOR / weights_name(kind) for kind in kinds}
    states: dict[str, dict[str, Tensor]] = {}
    for kind, file in files.items():
        if file.is_file():
            states[kind] = card.kind.to_published(card.transformer, read_tensors(file)[0])
            check_finite(states[kind], source=str(file), mend="Take an earlier checkpoint of it")
    if "ema" not in states:
        raise UserError(f"'{files['ema']}' does not exist", "Is the run whole?")
    if card.models_tokens:
        content: Any = {"model_state_dict": states["ema"]}
    else:
        note = json.dumps({"shift": card.shift, "scale": card.scale})
        content = {**states, NOTE: note} if len(states) > 1 else states["ema"]
    write_atomically(path, lambda part: torch.save(content, part))
    return card


@torch.no_grad()
def largest_difference(one: Backbone, other: Backbone) -> float:
    """Compare what two networks answer to the same random inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.rand(each.shape, generator=generator) if each.is_floating_point() else each
        for each in one.config.example()
    ]
    return float((one(*inputs) - other(*inputs)).abs().max())
