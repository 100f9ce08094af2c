"""Schedules in closed form, exact counts, and plans in which each token has its turn."""

import math

import pytest
import torch

from eqvae.generators.maskgit import masked_share, masks_from_uniform, num_masked, tokens_per_step

CLOSED_FORMS = {
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
}
MEAN_SHARES = {"arccos": 2 / math.pi, "cosine": 2 / math.pi, "linear": 1 / 2, "square": 2 / 3}
"""Integrals of gamma over [0, 1]."""

schedules = pytest.mark.parametrize("schedule", CLOSED_FORMS)


@schedules
def test_shares_follow_their_closed_forms(schedule):
    r = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = torch.tensor([CLOSED_FORMS[schedule](value) for value in r.tolist()], dtype=torch.float64)
    share = masked_share(schedule, r)
    assert torch.allclose(share, expected, atol=1e-12)
    assert share[0] == 1
    assert share[-1].item() == pytest.approx(0.0, abs=1e-12)
    assert (share.diff() < 0).all()
    assert ((share >= 0) & (share <= 1)).all()


@schedules
def test_counts_are_rounded_up_and_never_zero(schedule):
    r = torch.tensor([0.0, 0.1, 0.37, 0.5, 0.9, 0.999, 1.0])
    expected = [max(math.ceil(CLOSED_FORMS[schedule](value) * 64 - 1e-7), 1) for value in r.tolist()]
    assert num_masked(schedule, r, 64).tolist() == expected
    assert num_masked(schedule, r, 1).tolist() == [1] * 7


def test_rounding_up_is_not_misled_by_the_last_bit_of_a_fraction():
    thirds = torch.arange(10, dtype=torch.float64) / 9
    assert num_masked("linear", thirds, 9).tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 1]


@schedules
def test_masks_have_exactly_the_count_and_hide_the_smallest_numbers(schedule):
    generator = torch.Generator().manual_seed(0)
    shares, cells = torch.rand(50, generator=generator), torch.rand(50, 4, 6, generator=generator)
    masks = masks_from_uniform(schedule, shares, cells)
    assert torch.equal(masks.flatten(1).sum(1), num_masked(schedule, shares, 24))
    for mask, cell in zip(masks, cells, strict=True):
        assert mask.all() or cell[mask].max() < cell[~mask].min()
    assert torch.equal(masks_from_uniform(schedule, shares[7:9], cells[7:9]), masks[7:9])


def test_equal_numbers_do_not_change_the_count():
    masks = masks_from_uniform("linear", torch.tensor([0.5, 0.75]), torch.full((2, 4, 4), 0.25))
    assert masks.flatten(1).sum(1).tolist() == [8, 4]


@schedules
def test_the_mean_share_is_the_integral_and_no_cell_is_preferred(schedule):
    generator = torch.Generator().manual_seed(1)
    masks = masks_from_uniform(
        schedule, torch.rand(20_000, generator=generator), torch.rand(20_000, 8, 8, generator=generator)
    ).float()
    expected = MEAN_SHARES[schedule] + 0.5 / 64  # rounding up adds half a token on average
    assert masks.mean().item() == pytest.approx(expected, abs=0.006)
    assert (masks.mean(0) - masks.mean()).abs().max() < 0.02


@schedules
@pytest.mark.parametrize("rule", ["remaining", "increments"])
def test_a_plan_fills_all_tokens_and_some_in_each_step(schedule, rule):
    for num_tokens in (1, 5, 64, 256):
        for num_steps in (1, 2, 3, 8, 12, 63, 64, 300):
            counts = tokens_per_step(schedule, num_tokens, num_steps, rule=rule)
            assert len(counts) == min(num_steps, num_tokens)
            assert sum(counts) == num_tokens
            assert min(counts) >= 1


@schedules
def test_after_each_step_gamma_tokens_remain(schedule):
    counts = tokens_per_step(schedule, 256, 8)
    remaining = [256 - sum(counts[:step]) for step in range(1, 9)]
    assert remaining == [math.ceil(CLOSED_FORMS[schedule](step / 8) * 256 - 1e-7) for step in range(1, 8)] + [0]


def test_increments_are_those_of_the_published_code():
    # In proportion to arccos(1), arccos(6/7), ..., arccos(0); the first is none, for which one is taken.
    parts = [math.acos(r / 7) for r in range(7, -1, -1)]
    counts = tokens_per_step("arccos", 256, 8, rule="increments")
    rounded = [max(round(256 * part / sum(parts)), 1) for part in parts]
    assert list(counts) == [*rounded[:-1], 256 - sum(rounded[:-1])] == [1, 18, 26, 32, 38, 43, 48, 50]


@pytest.mark.parametrize(("num_tokens", "num_steps"), [(0, 1), (4, 0)])
def test_nothing_to_plan_is_refused(num_tokens, num_steps):
    with pytest.raises(ValueError, match=f"{num_tokens} tokens are to be filled in {num_steps} steps"):
        tokens_per_step("cosine", num_tokens, num_steps)
