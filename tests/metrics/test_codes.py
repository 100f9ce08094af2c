"""Usage, perplexity and agreement of tokens: closed forms."""

import pytest
import torch

from eqvae.metrics.autoencoder import CodeCounts
from eqvae.metrics.per_image import token_agreement


def test_codes_used_alike_have_their_number_as_perplexity():
    codes = CodeCounts(8)
    codes.add(torch.arange(8).repeat(3).view(2, 3, 4))
    assert codes.figures() == pytest.approx({"codebook_usage": 1.0, "codebook_perplexity": 8.0})


def test_a_single_code_has_perplexity_one():
    codes = CodeCounts(10)
    codes.add(torch.full((2, 3, 3), 7))
    assert codes.figures() == pytest.approx({"codebook_usage": 0.1, "codebook_perplexity": 1.0})


def test_batches_are_counted_together():
    tokens = torch.randint(0, 20, (6, 4, 4), generator=torch.Generator().manual_seed(0))
    whole, parts = CodeCounts(32), CodeCounts(32)
    whole.add(tokens)
    for part in tokens.split(4):
        parts.add(part)
    assert torch.equal(whole.counts, parts.counts)
    shares = torch.bincount(tokens.flatten()) / tokens.numel()
    entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
    assert whole.figures()["codebook_perplexity"] == pytest.approx(entropy.exp().item(), rel=1e-5)


def test_agreement_is_the_share_of_equal_positions():
    tokens = torch.arange(12).view(2, 2, 3)
    others = tokens.clone()
    others[1, 0, :] += 1
    assert token_agreement(tokens, others).tolist() == [1.0, 0.5]
