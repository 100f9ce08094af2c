"""How pictures of any number of channels are shown to eyes and networks of three."""

import pytest
import torch

from eqvae.artifacts.channels import describe_channels, describe_shown, in_triples, mean_over_triples, shown, triples


@pytest.mark.parametrize(
    ("num_channels", "expected"),
    [(1, [(0, 0, 0)]), (2, [(0, 1, 0)]), (3, [(0, 1, 2)]), (4, [(0, 1, 2), (3, 0, 1)]), (5, [(0, 1, 2), (3, 4, 0)]),
     (6, [(0, 1, 2), (3, 4, 5)])],
)  # fmt: skip
def test_triples_hold_every_channel(num_channels: int, expected: list[tuple[int, int, int]]) -> None:
    assert list(triples(num_channels)) == expected
    assert {each for triple in triples(num_channels) for each in triple} == set(range(num_channels))


def test_three_channels_are_seen_as_they_are() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert in_triples(x)[0] is x and shown(x) is x
    assert mean_over_triples(lambda a, b: (a - b).abs().mean((1, 2, 3)), x, x.flip(0)).shape == (2,)


def test_a_network_s_answers_are_averaged_and_each_channel_counts() -> None:
    x = torch.rand(1, 5, 4, 4, requires_grad=True)
    value = mean_over_triples(lambda view: view.square().sum((1, 2, 3)), x)
    expected = (x[:, [0, 1, 2]].square().sum() + x[:, [3, 4, 0]].square().sum()) / 2
    assert torch.allclose(value, expected)
    value.sum().backward()
    assert x.grad is not None and bool((x.grad.abs().sum((2, 3)) > 0).all())


def test_what_is_done_is_said() -> None:
    assert (describe_channels(3), describe_shown(1), describe_shown(3)) == ("", "", "")
    assert "grey" in describe_channels(1)
    assert "(1, 2, 3) and (4, 5, 1), averaged; pictures show channels 1, 2, 3 of 5" in describe_channels(5)
