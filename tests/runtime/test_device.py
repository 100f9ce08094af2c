"""Counted operations and the measured peak."""

import pytest
import torch
from torch import nn

from eqvae.runtime.device import count_flops, matrix_peak_flops_per_sec


def test_counting_a_linear_layer():
    assert count_flops(nn.Linear(16, 32), torch.zeros(5, 16)) == 2 * 5 * 16 * 32
    with torch.device("meta"):
        assert count_flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 10, 10)) == 2 * 2 * 8 * 3 * 9 * 100


def test_counting_attention():
    q = torch.empty(2, 3, 50, 8, device="meta")
    counted = count_flops(nn.functional.scaled_dot_product_attention, q, q, q)
    assert counted == 2 * 2 * (2 * 3 * 50 * 50 * 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_a_processors(precision):
    peak = matrix_peak_flops_per_sec(torch.device("cpu"), precision, side=128)
    assert 1e7 < peak < 1e15
