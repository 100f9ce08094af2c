"""Sums of moments: closed forms, and equal to statistics over all values at once."""

import pytest
import torch

from eqvae.artifacts.files import to_plain
from eqvae.latents.index import MomentSums


def test_a_mean_that_never_varies_leaves_the_posterior_width():
    mean = torch.tensor([2.0, -3.0])[None, :, None, None].expand(5, 2, 4, 4)
    std = torch.tensor([0.5, 2.0])[None, :, None, None].expand(5, 2, 4, 4)
    measures = MomentSums.of(mean, std).measures()
    assert measures.mean == (2.0, -3.0)
    assert measures.std == (0.5, 2.0)
    assert measures.std_of_means == (0.0, 0.0)


def test_sums_of_parts_are_the_statistics_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(150, 3, 2, 4, generator=generator) * 2 + 1
    std = torch.rand(150, 3, 2, 4, generator=generator)
    sums = MomentSums.of(mean[:40], std[:40]) + MomentSums.of(mean[40:], std[40:])
    measures = MomentSums.from_plain(to_plain(sums)).measures()
    values = mean.double().transpose(0, 1).flatten(1)
    total = values.var(1, unbiased=False) + std.double().square().mean((0, 2, 3))
    assert measures.mean == pytest.approx(values.mean(1).tolist())
    assert measures.std_of_means == pytest.approx(values.std(1, unbiased=False).tolist())
    assert measures.std == pytest.approx(total.sqrt().tolist())


def test_without_a_width_both_deviations_agree():
    measures = MomentSums.of(torch.randn(4, 2, 3, 3), None).measures()
    assert measures.std == measures.std_of_means
