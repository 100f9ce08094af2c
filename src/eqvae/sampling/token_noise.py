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
        """Seed the generators.

        Args:
            seed: Of the sample set, at least 0.
            indices: Which images of the sample set this batch holds, each at least 0.
            grid: Rows and columns of tokens.
            device: Where the numbers, and with them the sampler's state, shall be.
        """
        self.device, self.grid = torch.device(device), grid
        self._generators = [generator_for(seed, index, TOKEN_STREAM) for index in indices]

    def __len__(self) -> int:
        """Count the images."""
        return len(self._generators)

    def uniform(self) -> Float[Tensor, "n tokens"]:
        """Draw.

        Returns:
            The next number in [0, 1) for each token of each image.
        """
        return self._stacked([torch.rand(self._num_tokens, generator=generator) for generator in self._generators])

    def gumbel(self) -> Float[Tensor, "n tokens"]:
        """Draw.

        Returns:
            The next number of the standard Gumbel distribution for each token of each image.
        """
        smallest = 2.0**-25  # half of the least positive number that `rand` gives, in the place of its 0
        drawn = [torch.rand(self._num_tokens, generator=generator) for generator in self._generators]
        return self._stacked([-(-uniform.clamp(min=smallest).log()).log() for uniform in drawn])

    def cells(self) -> Int64[Tensor, " n"]:
        """Draw.

        Returns:
            For each image one of its cells.
        """
        drawn = [torch.randint(self._num_tokens, (1,), generator=generator) for generator in self._generators]
        return torch.cat(drawn).to(self.device)

    @property
    def _num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def _stacked(self, drawn: list[Tensor]) -> Tensor:
        return torch.stack(drawn).to(self.device)
