"""Attention: the way that is written out gives what the fused kernel gives, to the rounding of bf16."""

import pytest
import torch
import torch.nn.functional as F

from eqvae.generators.transformer import MAX_WRITTEN_OUT_TOKENS, attend
from eqvae.runtime.seeds import generator_for


@pytest.mark.parametrize("num_tokens", [1, 64, 257])
def test_output_and_gradients_equal_the_exact_ones_to_rounding(num_tokens: int) -> None:
    generator = generator_for(0, num_tokens)
    inputs = [torch.randn(2, 3, num_tokens, 16, generator=generator).bfloat16() for _ in range(3)]
    direction = torch.randn(2, 3, num_tokens, 16, generator=generator)
    own = [each.clone().requires_grad_() for each in inputs]
    exact = [each.double().requires_grad_() for each in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(*own)
    expected = F.scaled_dot_product_attention(*exact)
    output.backward(direction.bfloat16())
    expected.backward(direction.bfloat16().double())
    assert output.dtype is torch.bfloat16
    for got, wanted in [(output, expected), *((a.grad, b.grad) for a, b in zip(own, exact, strict=True))]:
        assert got is not None
        assert wanted is not None
        assert (got.double() - wanted).norm() <= 0.01 * wanted.norm() + 1e-6


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "learns"),
    [(torch.float32, 8, True), (torch.bfloat16, 8, False), (torch.bfloat16, MAX_WRITTEN_OUT_TOKENS + 1, True)],
)
def test_the_fused_kernel_elsewhere(dtype: torch.dtype, num_tokens: int, learns: bool) -> None:
    generator = generator_for(1)
    inputs = [torch.randn(1, 1, num_tokens, 8, generator=generator).to(dtype) for _ in range(3)]
    inputs = [each.requires_grad_(learns) for each in inputs]
    assert attend(*inputs).equal(F.scaled_dot_product_attention(*inputs))
