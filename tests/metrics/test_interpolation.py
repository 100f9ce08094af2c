"""Latents between latents, as the paper's abstract and as its authors' code have them."""

import math

import pytest
import torch

from eqvae.metrics.interpolation import choose_partners, midpoints

Z = torch.randn(30, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def test_the_papers_midpoint_lies_on_the_line_to_the_nearest() -> None:
    partners = choose_partners(Z, "paper")
    distances = torch.cdist(Z.flatten(1), Z.flatten(1)).fill_diagonal_(math.inf)
    assert torch.equal(partners, distances.argmin(1))
    torch.testing.assert_close(midpoints(Z, Z[partners], "paper"), (Z + Z[partners]) / 2)


def test_the_authors_draw_one_of_ten_by_cosine_and_again_for_a_seed() -> None:
    cosines = torch.nn.functional.cosine_similarity(Z.flatten(1)[:, None], Z.flatten(1)[None], dim=-1)
    nearest = cosines.fill_diagonal_(-2.0).topk(10).indices
    partners = choose_partners(Z, "authors", seed=3)
    assert all(int(partner) in near for partner, near in zip(partners, nearest.tolist(), strict=True))
    assert torch.equal(partners, choose_partners(Z, "authors", seed=3))
    assert not torch.equal(partners, choose_partners(Z, "authors", seed=4))
    assert choose_partners(Z[:2], "authors").tolist() == [1, 0]


def test_a_great_circle_keeps_the_length_of_unit_vectors() -> None:
    a, b = (torch.nn.functional.normalize(z.flatten(1), dim=1).view_as(z) for z in (Z[:5], Z[5:10]))
    middle = midpoints(a, b, "authors")
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), torch.ones(5))
    torch.testing.assert_close((middle * a).flatten(1).sum(1), (middle * b).flatten(1).sum(1))
    torch.testing.assert_close(midpoints(a, 3.0 * a, "authors"), 2.0 * a)


@pytest.mark.parametrize("kind", ["paper", "authors"])
def test_one_latent_twice_is_its_own_midpoint(kind: str) -> None:
    twice = Z[:1].repeat(2, 1, 1, 1)
    torch.testing.assert_close(midpoints(twice, twice[choose_partners(twice, kind)], kind), twice)
