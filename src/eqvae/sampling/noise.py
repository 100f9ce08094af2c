"""What every sampler is given and tells: each image's own noise and label, and the steps on the way.

All chance follows from (seed, image), so that image i is the same for any batch size, order and number of processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.protocol import Predict
from eqvae.runtime.seeds import generator_for

NOISE_STREAM, LABEL_STREAM, TOKEN_STREAM = 1, 2, 3
"""Last part of the key of an image's random numbers: its noise and its label are independent. None is 0, since NumPy's
seed sequences do not tell a key from the same key with a zero behind it."""


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
        self.device, self.dtype = torch.device(device), dtype
        self._generators = [generator_for(seed, index, NOISE_STREAM) for index in indices]
        self._shape = (len(self._generators), *shape)

    def next(self) -> Float[Tensor, "n c h w"]:
        pinned = self.device.type == "cuda"
        drawn = torch.empty(self._shape, pin_memory=pinned)
        for image, generator in zip(drawn, self._generators, strict=True):
            torch.randn(image.shape, generator=generator, out=image)
        return drawn.to(self.device, self.dtype, non_blocking=pinned)


class TokenNoise:
    """The random numbers of one batch of token grids, drawn like `ImageNoise`: once per step, on the CPU."""

    def __init__(
        self, seed: int, indices: Sequence[int], grid: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> None:
        self.device, self.grid = torch.device(device), grid
        self._generators = [generator_for(seed, index, TOKEN_STREAM) for index in indices]

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self) -> Float[Tensor, "n tokens"]:
        return self._stacked([torch.rand(self._num_tokens, generator=generator) for generator in self._generators])

    def gumbel(self) -> Float[Tensor, "n tokens"]:
        smallest = 2.0**-25  # half of the least positive number that `rand` gives, in the place of its 0
        drawn = [torch.rand(self._num_tokens, generator=generator) for generator in self._generators]
        return self._stacked([-(-uniform.clamp(min=smallest).log()).log() for uniform in drawn])

    @property
    def _num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def _stacked(self, drawn: list[Tensor]) -> Tensor:
        return torch.stack(drawn).to(self.device)


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
        raise UserError("A list of classes was given, but the generator is unconditional", "Leave the classes out")
    if not classes:
        raise UserError("The list of classes to sample is empty", f"Name at least one of 0 to {num_classes - 1}")
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"Class {label} is not one of the generator's", f"Choose from 0 to {num_classes - 1}")
    return torch.tensor([classes[index % len(classes)] for index in indices], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class SamplingStep:
    """The state of a batch before one of a sampler's steps."""

    step: int
    """Counted from 0."""

    t: Shaped[Tensor, " n"]
    """What the backbone is told: a diffusion's steps of training, or an interpolant's time. In `dopri5` each image has
    its own."""

    z: Float[Tensor, "n c h w"]
    """Noisy latents at t."""

    denoised: Float[Tensor, "n c h w"]
    """The expected latents without noise, given z: what a preview shows."""


Callback = Callable[[SamplingStep], None]


def ask(
    predict: Predict, z: Float[Tensor, "n c h w"], t: Shaped[Tensor, " n"], labels: Int64[Tensor, " n"]
) -> Float[Tensor, "n c2 h w"]:
    """Call the backbone, and go on in the sampler's own type where the backbone autocasts."""
    return predict(z, t, labels).to(z.dtype)
