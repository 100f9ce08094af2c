"""Pairs of views with known flow, as `viewpoint` reads them: a folder of `.npz` files, one for each pair.

Each holds `first` and `second`, (h, w, 3) uint8, and `flow`, (h, w, 2) float32: the pixel at row i, column j of
`second` is the one at row i + flow[i, j, 1], column j + flow[i, j, 0] of `first`; NaN where the scene is occluded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eqvae.artifacts.parsing import DAMAGE
from eqvae.errors import UserError
from eqvae.images.sizes import ImageSize

_Found = TypeVar("_Found")


@dataclass(frozen=True, kw_only=True)
class Views:
    """Some pairs of views."""

    first: Float[Tensor, "n 3 h w"]
    second: Float[Tensor, "n 3 h w"]
    grid: Float[Tensor, "n h2 w2 2"]
    """Of latents: where each of the second view's cells lies in the first view."""
    mask: Float[Tensor, "n 1 h w"]
    """1 for the pixels of cells that both views see, else 0."""


def list_views(folder: Path) -> list[Path]:
    """The files of a folder in their order."""
    found = sorted(folder.glob("*.npz"))
    if not found:
        raise UserError(
            f"--method viewpoint: '{folder}' holds no view pairs", "It should hold .npz files, as in docs/methods.md"
        )
    return found


def check_views(folder: Path, image_size: ImageSize) -> None:
    """Refuse a folder in which a file is cut off, or whose first pair is of another size."""
    if not image_size.is_square:
        raise UserError(f"--method viewpoint has square views, not of {image_size}", "Give a square --image-size")
    files = list_views(folder)
    for path in files:
        _opened(path, lambda file: file.files)
    _read(files[0], image_size.width)


def read_views(folder: Path, numbers: Sequence[int], *, image_size_px: int, stride: int) -> Views:
    """Read the pairs that numbers choose."""
    files = list_views(folder)
    pairs = [_read(files[number % len(files)], image_size_px) for number in numbers]
    first, second = (torch.stack([pair[index] for pair in pairs]) for index in (0, 1))
    source = torch.stack([pair[2] for pair in pairs])
    # A cell comes from where its pixels come from in the mean; all of them have to be seen, and from within the frame.
    is_seen = (source.abs() <= 1.0).all(1, keepdim=True).float()  # NaN is not
    cells = -F.max_pool2d(-is_seen, stride)
    mean = F.avg_pool2d(source.nan_to_num(), stride)
    mask = cells.repeat_interleave(stride, -2).repeat_interleave(stride, -1)
    return Views(first=first, second=second, grid=mean.permute(0, 2, 3, 1), mask=mask)


def _opened(path: Path, read: Callable[[Any], _Found]) -> _Found:
    """Read something of a file of arrays."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return read(file)
    except DAMAGE as error:
        raise UserError(f"'{path}' is no pair of views ({error})", "It should hold first, second and flow") from None


def _read(path: Path, size_px: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two images in [-1, 1], and where the second one's pixels lie in the first, -1 to 1 over the frame."""
    first, second, flow = _opened(path, lambda file: [file[name] for name in ("first", "second", "flow")])
    shapes = ((size_px, size_px, 3), (size_px, size_px, 3), (size_px, size_px, 2))
    dtypes, is_real = {first.dtype, second.dtype}, np.issubdtype(flow.dtype, np.floating)
    if (first.shape, second.shape, flow.shape) != shapes or dtypes != {np.dtype("uint8")} or not is_real:
        raise UserError(
            f"'{path}' holds views of {first.shape} and a flow of {flow.shape}, {flow.dtype}",
            f"Give uint8 views and a float32 flow of --image-size {size_px}",
        )
    images = [torch.from_numpy(view.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1) for view in (first, second)]
    here = torch.from_numpy(np.stack(np.meshgrid(np.arange(size_px), np.arange(size_px)), 0).astype(np.float32))
    source = here + torch.from_numpy(flow.astype(np.float32)).permute(2, 0, 1)
    return images[0], images[1], (2.0 * source + 1.0) / size_px - 1.0
