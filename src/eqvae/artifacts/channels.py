"""Pictures of any number of channels before eyes and networks that see three."""

from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor


def triples(num_channels: int) -> tuple[tuple[int, int, int], ...]:
    """Group channels by threes in their order; the last triple is filled up from the first channels. Grey is repeated.

    Five are seen as (0, 1, 2) and (3, 4, 0): each channel counts, and each triple costs one pass through a network.
    """
    numbers = [number % num_channels for number in range(-(-num_channels // 3) * 3)]
    return tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def in_triples(images: Shaped[Tensor, "n k h w"]) -> list[Shaped[Tensor, "n 3 h w"]]:
    """Show pictures as pictures of three channels: themselves where they have three."""
    num_channels = images.shape[1]
    return [images] if num_channels == 3 else [images[:, list(each)] for each in triples(num_channels)]


def mean_over_triples(network: Callable[..., Tensor], *images: Shaped[Tensor, "n k h w"]) -> Tensor:
    """Average what a network of three channels says of each triple."""
    values = [network(*views) for views in zip(*map(in_triples, images), strict=True)]
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


def shown(images: Shaped[Tensor, "n k h w"]) -> Shaped[Tensor, "n 3 h w"]:
    """Choose the colours that a picture is drawn in: its first triple's."""
    return in_triples(images)[0]


def describe_shown(num_channels: int) -> str:
    """Say which channels of several a picture shows; nothing where it shows all there are."""
    if num_channels in (1, 3):
        return ""
    return f"channels {', '.join(str(number + 1) for number in triples(num_channels)[0])} of {num_channels}"


def describe_channels(num_channels: int) -> str:
    """Say in one line what is made of channels other than three; nothing of three."""
    if num_channels == 3:
        return ""
    if num_channels == 1:
        return "CHANNELS: 1; networks trained on colours see grey as red, green and blue alike"
    groups = " and ".join(f"({', '.join(str(number + 1) for number in each)})" for each in triples(num_channels))
    return (
        f"CHANNELS: {num_channels}; networks trained on colours see {groups}, averaged; pictures show "
        f"{describe_shown(num_channels)} as red, green and blue"
    )
