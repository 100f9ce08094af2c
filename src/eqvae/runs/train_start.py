"""How a generator's training begins from another run's weights: `--init`, also on another autoencoder's latents."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from eqvae.artifacts.files import load_strictly
from eqvae.errors import UserError, printable
from eqvae.generators.alignment import align, fold
from eqvae.generators.checkpoints import Generator, GeneratorCard, read_generator
from eqvae.generators.protocol import Objective
from eqvae.generators.recipes import Backbone
from eqvae.generators.transformer import TransformerConfig
from eqvae.latents.cache import LatentCache, Normalization
from eqvae.latents.matching import Patched, patch_moments
from eqvae.runs.train_config import Plan
from eqvae.runtime.journal import say, say_once

ALIGN_IMAGES = 10_000
"""Patches of as many images tell a map of some hundred numbers."""


def begin_from(run: Path, transformer: Backbone, plan: Plan) -> dict[str, float]:
    """Replace first weights by the averaged ones of another run; returns how alike the latents of both are."""
    generator, figures = read_generator(run), dict[str, float]()
    weights = generator.transformer.state_dict()
    old_latents = plan.config.adaptation.old_latents
    _check_alike(run, generator.card, plan, aligned=old_latents is not None)
    if old_latents is not None:
        weights, figures = _aligned(run, generator, old_latents, plan)
    state = transformer.state_dict()
    for name, first in state.items():  # another teacher's tokens may be of another width: its projector begins anew
        if name.startswith("projectors.") and (name not in weights or weights[name].shape != first.shape):
            weights[name] = first
    load_strictly(transformer, weights, source=str(run), mend="Choose the same options for the transformer")
    return figures


def _check_alike(run: Path, card: GeneratorCard, plan: Plan, *, aligned: bool) -> None:
    """Refuse to begin from another kind of generator; one that is aligned may be of other latents."""
    theirs, own = card.transformer, plan.transformer
    names = [card.recipe, str(plan.recipe)]
    if aligned:
        names = [name.rpartition("-")[0] for name in names]  # the patch size follows from the latents
    differences = (
        ("a", *(f"'{name}'" for name in names)),
        ("of", *(f"{each.latents.num_classes} classes" for each in (theirs, own))),
        ("of latents of", *("" if aligned else _by(each.latents.shape) for each in (theirs, own))),
        ("of tokens of", *(_by(each.grid) for each in (theirs, own))),
        ("trained on", *(_describe_path(each.interpolant) for each in (card, plan.recipe))),
    )
    for what, there, here in differences:
        if there != here:
            raise UserError(f"--init '{run}' is {what} {there}, this run {what} {here}", "Name a run that is alike")
    classes = zip(card.class_names or (), plan.cache.index.class_names or (), strict=False)
    for number, (there, here) in enumerate(classes):
        if there != here:
            say(f"--init '{run}': class {number} is '{printable(there)}' there and '{printable(here)}' here")
            break


def _aligned(
    run: Path, generator: Generator, old_latents: Path, plan: Plan
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Fit the ends of a generator to the plan's latents, by the old latents of the same images."""
    card, objective = generator.card, plan.objective
    coupling = objective.coupling() if isinstance(objective, Objective) else None
    assert coupling is not None  # as all have that may be adapted
    old_config, new_config = (cast(TransformerConfig, each) for each in (card.transformer, plan.transformer))
    if not old_latents.exists():
        mend = f"Give the cache that '{run}' was trained on, or encode it again"
        raise UserError(f"--old-latents '{old_latents}' does not exist", mend)
    old = LatentCache.open(old_latents)
    _check_made_by(run, card, old)
    normalization = Normalization(shift=torch.tensor(card.shift), scale=torch.tensor(card.scale))
    moments = patch_moments(
        Patched(cache=old, normalization=normalization, patch_size=old_config.patch_size),
        Patched(cache=plan.cache, normalization=plan.cache.normalization, patch_size=new_config.patch_size),
        num_images=plan.config.adaptation.align_images or ALIGN_IMAGES,
    )
    of_old, of_new = moments.explained()
    say_once(
        f"aligned: patch by patch, {of_old:.1%} of the old latents' variance is affine in the new ones, and "
        f"{of_new:.1%} the other way"
    )
    weights = fold(generator.transformer.state_dict(), align(moments, coupling), old_config, new_config)
    return weights, {"explained_of_old": of_old, "explained_of_new": of_new}


def _check_made_by(run: Path, card: GeneratorCard, old: LatentCache) -> None:
    """Refuse a cache that the run was not trained on."""
    index = old.index
    if index.kind != "moments" or old.latent_shape != card.transformer.latents.shape:
        raise UserError(
            f"--old-latents '{old.folder}' holds {index.kind} of {_by(old.latent_shape)}, and '{run}' was trained on "
            f"latents of {_by(card.transformer.latents.shape)}",
            "Give the cache that it was trained on",
        )
    digests = (index.encoder_fingerprint, card.encoder_fingerprint)
    if None in digests:  # written by an older eqvae
        digests = (index.fingerprint, card.autoencoder_fingerprint)
    if digests[0] != digests[1]:
        raise UserError(
            f"--old-latents '{old.folder}' are of '{index.autoencoder}', and '{run}' was trained on those of another "
            f"autoencoder ('{card.autoencoder}', or one with its encoder)",
            "Give the cache that it was trained on, or encode it again",
        )


def _by(sides: Iterable[int]) -> str:
    return " x ".join(map(str, sides))


def _describe_path(interpolant: Any) -> str:
    return "no path" if interpolant is None else f"path {interpolant.path} and {interpolant.prediction}"
