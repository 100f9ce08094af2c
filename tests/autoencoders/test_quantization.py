"""The search against brute force; gradients that pass straight through; both terms of the codebook's loss."""

import pytest
import torch

from eqvae.autoencoders.quantization import look_up, nearest_codes, quantize


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(vectors, codebook):
    return (vectors[:, None].double() - codebook[None].double()).square().sum(2).argmin(1)


@pytest.mark.parametrize(("num_codes", "width"), [(1, 3), (7, 1), (50, 16), (300, 256)])
@pytest.mark.parametrize("block_size", [1, 128, 2**22])
def test_the_nearest_codes_are_those_of_brute_force(num_codes, width, block_size):
    vectors, codebook = draw(97, width), draw(num_codes, width, seed=1)
    tokens = nearest_codes(vectors, codebook, block_size=block_size)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, brute_force(vectors, codebook))


def test_codes_of_an_untrained_codebook_are_told_apart():
    codebook = (torch.rand(1024, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1) / 1024
    vectors = draw(200, 16, seed=1)
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))


def test_no_vectors_have_no_codes():
    assert nearest_codes(torch.empty(0, 4), draw(5, 4)).shape == (0,)


def test_a_code_is_its_own_nearest_and_tokens_lie_as_latents_do():
    codebook, tokens = draw(20, 4), torch.arange(20).view(1, 4, 5)
    z = look_up(tokens, codebook)
    assert z.shape == (1, 4, 4, 5)
    assert torch.equal(z[0, :, 2, 3], codebook[13])
    quantized = quantize(z, codebook)
    assert torch.equal(quantized.tokens, tokens)
    assert torch.equal(quantized.z_q, z)
    assert quantized.codebook_loss.item() == quantized.commitment_loss.item() == 0.0


def test_values_are_the_codes_exactly_and_gradients_pass_straight_through():
    z, codebook = (10 * draw(2, 4, 3, 5)).requires_grad_(), draw(20, 4, seed=1).requires_grad_()
    z_q = quantize(z, codebook).z_q
    nearest = brute_force(z.detach().permute(0, 2, 3, 1).reshape(-1, 4), codebook).view(2, 3, 5)
    assert torch.equal(z_q, look_up(nearest, codebook))
    upstream = draw(2, 4, 3, 5, seed=2)
    z_q.backward(upstream)
    assert torch.equal(z.grad, upstream)
    assert codebook.grad is None


def test_losses_pull_codes_to_latents_and_latents_to_codes():
    z, codebook = draw(3, 4, 2, 2).requires_grad_(), draw(6, 4, seed=1).requires_grad_()
    quantized = quantize(z, codebook)
    codes = look_up(quantized.tokens, codebook).detach()
    expected = (z.detach() - codes).square().sum((1, 2, 3))
    torch.testing.assert_close(quantized.codebook_loss.detach(), expected)
    torch.testing.assert_close(quantized.commitment_loss.detach(), expected)

    quantized.codebook_loss.sum().backward()
    assert z.grad is None
    pull = torch.zeros(6, 4)
    pull.index_add_(0, quantized.tokens.flatten(), (2 * (codes - z.detach())).permute(0, 2, 3, 1).reshape(-1, 4))
    torch.testing.assert_close(codebook.grad, pull)
    codebook.grad = None
    quantized.commitment_loss.sum().backward()
    assert codebook.grad is None
    torch.testing.assert_close(z.grad, 2 * (z.detach() - codes))


def test_autocast_changes_no_token():
    z, codebook = draw(2, 8, 4, 4), 0.05 * draw(500, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = quantize(z, codebook)
    assert torch.equal(within.tokens, quantize(z, codebook).tokens)
    assert within.commitment_loss.dtype == torch.float32
    half = quantize(z.bfloat16(), codebook)
    assert half.z_q.dtype == torch.bfloat16
    assert torch.equal(half.tokens, quantize(z.bfloat16().float(), codebook).tokens)
