"""Random numbers of its own for each image of tokens, so that image i is the same for any batch size and order."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.runtime.seeds import generator_for

TOKEN_STREAM = 3
"""Last part of the key of an image's numbers; see `noise.NOISE_STREAM` and `labels.LABEL_STREAM`."""


class TokenNoise:
    """The random numbers of one batch: a generator for each image, asked by a sampler once per step.

    Numbers are drawn on the CPU, and image by image, so that they are the same on any device and in any batch.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], grid: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> None:
        """Seed the generators."""
        self.device, self.grid = torch.device(device), grid
        self._generators = [generator_for(seed, index, TOKEN_STREAM) for index in indices]

    def __len__(self) -> int:
        """Count the images."""
        return len(self._generators)

    def uniform(self) -> Float[Tensor, "n tokens"]:
        """Draw."""
        return self._stacked([torch.rand(self._num_tokens, generator=generator) for generator in self._generators])

    def gumbel(self) -> Float[Tensor, "n tokens"]:
        """Draw."""
        smallest = 2.0**-25  # half of the least positive number that `rand` gives, in the place of its 0
        drawn = [torch.rand(self._num_tokens, generator=generator) for generator in self._generators]
        return self._stacked([-(-uniform.clamp(min=smallest).log()).log() for uniform in drawn])

    def cells(self) -> Int64[Tensor, " n"]:
        """Draw."""
        drawn = [torch.randint(self._num_tokens, (1,), generator=generator) for generator in self._generators]
        return torch.cat(drawn).to(self.device)

    @property
    def _num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def _stacked(self, drawn: list[Tensor]) -> Tensor:
        return torch.stack(drawn).to(self.device)
