"""Families: sizes, names and what each is trained for."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eqvae.errors import UserError
from eqvae.generators.diffusion import DiffusionObjective, DitConfig
from eqvae.generators.families import FAMILIES, NAMES, RepaSit, find_recipe
from eqvae.generators.interpolant import Interpolant, InterpolantObjective, SitConfig
from eqvae.generators.maskgit_transformer import MASKGIT_SIZES, PUBLISHED_TOKENS
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.recipes import PUBLISHED_LATENTS, SIZES
from eqvae.generators.repa import RepaConfig, RepaObjective
from eqvae.generators.transformer import Transformer

LATENT_FAMILIES = ("dit", "sit", "repa-sit")
PUBLISHED_MILLIONS = {"s": 33.0, "b": 130.5, "l": 458.1, "xl": 675.1}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_parameters_and_operations(size):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        transformer = Transformer(find_recipe(f"dit-{size}-2").transformer(PUBLISHED_LATENTS))
        transformer(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert transformer.num_parameters() == SIZES[size].num_parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(SIZES[size].gflops, rel=6e-3)
    if size in PUBLISHED_MILLIONS:
        assert round(transformer.num_parameters() / 1e6, 1) == PUBLISHED_MILLIONS[size]


def test_the_tiny_size_has_about_four_million_parameters():
    latents = LatentSpecification(channels=4, height=16, width=16, num_classes=10)
    with torch.device("meta"):
        transformer = Transformer(find_recipe("dit-ti-2").transformer(latents))
    assert 4.0e6 < transformer.num_parameters() < 4.5e6


def test_every_name_is_its_recipes():
    assert len(NAMES) == 4 * 5 * 4 + 5
    for name in NAMES:
        recipe = find_recipe(name.upper())
        assert str(recipe) == name
        assert name.startswith(f"{recipe.family}-")
        assert FAMILIES[recipe.family] is type(recipe)
        assert not isinstance(recipe, RepaSit) or 1 <= recipe.repa_depth < SIZES[recipe.size].depth


@pytest.mark.parametrize("name", ["dit-b", "dit-b-3", "maskgit", "maskgit-b-2", "dit-xxl-2", "mdt-b-2", "dit-b-2x", ""])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=f"there is no generator '{name}'"):
        find_recipe(name)


def test_a_misspelt_name_is_mended():
    with pytest.raises(UserError, match="Did you mean 'repa-sit-xl-2'?"):
        find_recipe("repasit-xl-2")


def test_families_are_trained_as_published():
    dit, sit, repa = (find_recipe(f"{family}-xl-2").objective(PUBLISHED_LATENTS) for family in LATENT_FAMILIES)
    assert isinstance(dit, DiffusionObjective)
    assert (dit.diffusion.num_steps, dit.learn_sigma, dit.label_dropout) == (1000, True, 0.1)
    assert isinstance(sit, InterpolantObjective)
    assert (sit.interpolant, sit.doubled_output) == (Interpolant(time_of_data=1), True)
    assert isinstance(repa, RepaObjective)
    assert (repa.depth, repa.weight) == (8, 0.5)
    assert isinstance(repa.objective, InterpolantObjective)
    assert (repa.objective.interpolant, repa.objective.doubled_output) == (Interpolant(time_of_data=0), False)
    widths = [find_recipe(f"{family}-s-4").transformer(PUBLISHED_LATENTS).out_channels for family in LATENT_FAMILIES]
    assert widths == [8, 8, 4]


def test_choices_reach_the_objective():
    path = Interpolant(path="gvp", prediction="noise")
    choices = SitConfig(path="gvp", prediction="noise", loss_weight="velocity"), RepaConfig(repa_weight=0.7)
    objective = find_recipe("repa-sit-ti-2", *choices).objective(
        replace(PUBLISHED_LATENTS, num_classes=3), label_dropout=0.2
    )
    assert isinstance(objective, RepaObjective)
    assert (objective.depth, objective.weight) == (3, 0.7)
    assert objective.objective == InterpolantObjective(
        num_classes=3, interpolant=path, weight="velocity", label_dropout=0.2
    )


def test_a_transformer_takes_the_latents_as_they_are():
    latents = LatentSpecification(channels=16, height=16, width=24, num_classes=0)
    config = find_recipe("repa-sit-s-4", DitConfig(qk_norm=True)).transformer(latents)
    assert (config.grid, config.out_channels, config.qk_norm) == ((4, 6), 16, True)


@pytest.mark.parametrize("size", MASKGIT_SIZES)
def test_sizes_of_maskgit_have_their_number_of_parameters(size):
    with torch.device("meta"):
        transformer = find_recipe(f"MaskGIT-{size}").transformer(PUBLISHED_TOKENS).build()
    assert transformer.num_parameters() == MASKGIT_SIZES[size].num_parameters


def test_the_base_size_of_maskgit_is_the_published_one():
    assert round(MASKGIT_SIZES["b"].num_parameters / 1e6, 3) == 174.161
