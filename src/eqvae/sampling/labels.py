"""Which class each image of a sample set shows: a function of the image's index, never of its batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.runtime.seeds import generator_for

LABEL_STREAM = 2
"""Last part of the key of an image's label, so that it does not depend on the image's noise."""


def balanced_labels(indices: Sequence[int], num_classes: int) -> Int64[Tensor, " n"]:
    """Go round the classes: any prefix of a sample set holds each class equally often, but for one image."""
    return torch.tensor([index % num_classes if num_classes else 0 for index in indices], dtype=torch.int64)


def random_labels(seed: int, indices: Sequence[int], num_classes: int) -> Int64[Tensor, " n"]:
    """Draw uniform labels."""

    def draw(index: int) -> int:
        return int(torch.randint(num_classes, (), generator=generator_for(seed, index, LABEL_STREAM)))

    return torch.tensor([draw(index) if num_classes else 0 for index in indices], dtype=torch.int64)


def listed_labels(indices: Sequence[int], classes: Sequence[int], num_classes: int) -> Int64[Tensor, " n"]:
    """Go round a list of classes."""
    if num_classes == 0:
        raise UserError(
            "A list of classes was given, but the generator is unconditional",
            "Leave the classes out",
        )
    if not classes:
        raise UserError("The list of classes to sample is empty", f"Name at least one of 0 to {num_classes - 1}")
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"Class {label} is not one of the generator's", f"Choose from 0 to {num_classes - 1}")
    return torch.tensor([classes[index % len(classes)] for index in indices], dtype=torch.int64)
