"""Noise of its own for each image, so that image i is the same for any batch size, order and number of processes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.runtime.seeds import generator_for

NOISE_STREAM = 1
"""Last part of the key of an image's noise; labels have another (`labels.LABEL_STREAM`). Not 0: NumPy's seed sequences
do not tell a key from the same key with a zero behind it."""


class ImageNoise:
    """The noise of one batch: a generator for each image, asked by a sampler once at the start and once per noisy step.

    Numbers are drawn on the CPU in float32 and then moved, so that they are the same on any device and for any type.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Seed the generators."""
        self.device, self.dtype = torch.device(device), dtype
        self._generators = [generator_for(seed, index, NOISE_STREAM) for index in indices]
        self._shape = (len(self._generators), *shape)

    def next(self) -> Float[Tensor, "n c h w"]:
        """Draw."""
        pinned = self.device.type == "cuda"
        drawn = torch.empty(self._shape, pin_memory=pinned)
        for image, generator in zip(drawn, self._generators, strict=True):
            torch.randn(image.shape, generator=generator, out=image)
        return drawn.to(self.device, self.dtype, non_blocking=pinned)
