"""An order of cells in which any first few are spread over the whole grid: the Halton sequence's.

Besnier et al., "Halton scheduler for masked generative image transformer", arXiv:2503.17076: tokens that are filled in
the same step should know little of each other, so they are taken far apart, whatever the network thinks of them.
"""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

ROW_BASE = 2
COLUMN_BASE = 3


def halton_order(height: int, width: int) -> Int64[Tensor, " cells"]:
    """Order the cells by the first point of the Halton sequence (bases 2 and 3, from its point 1 on) that hits them.

    Fractions are of integers, so that no cell is missed by rounding. The search ends: a cell contains a box of sides
    2^-a >= 1 / (4 height) and 3^-b >= 1 / (9 width), and such a box is hit once in 2^a 3^b consecutive points.
    """
    num_points = 4 * height * width
    while True:
        points = np.arange(1, num_points + 1, dtype=np.int64)
        cells = _hit(points, ROW_BASE, height) * width + _hit(points, COLUMN_BASE, width)
        found, first_points = np.unique(cells, return_index=True)
        if len(found) == height * width:
            return torch.from_numpy(found[first_points.argsort()])
        num_points *= 2


def _hit(points: np.ndarray, base: int, size: int) -> np.ndarray:
    """Say in which of `size` equal parts of [0, 1) the radical inverses of points lie."""
    numerator, denominator, rest = np.zeros_like(points), 1, points
    while rest.any():
        rest, digit = np.divmod(rest, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator * size // denominator
