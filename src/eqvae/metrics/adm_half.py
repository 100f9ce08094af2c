"""Precision and recall as ADM's evaluator rounds them: squared distances in float16, where those are finite.

openai/guided-diffusion, evaluations/evaluator.py, casts features to float16 and takes `|u|^2 - 2 u.v + |v|^2`; a block
with a number that is not finite is computed again in float32. Near 300, where Inception's squared distances lie,
float16 has steps of 0.25, so that points beside a ball's surface count as inside: published tables have this precision
and recall, up to 0.01 above the exact ones. Sums are kept in float32 and rounded at their end, as a GPU's kernels do.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from eqvae.metrics.neighbours import PrecisionRecall

_BLOCK_SIZE = 2048


@torch.no_grad()
def adm_half_precision_recall(
    *, reference: Float[Tensor, "n d"], samples: Float[Tensor, "m d"], num_neighbours: int = 3
) -> PrecisionRecall:
    """Compare two sets of feature vectors; see `eqvae.metrics.neighbours` for what is compared."""
    real_radii, fake_radii = (_squared_radii(each, num_neighbours) for each in (reference, samples))
    fake_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    real_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows in torch.arange(len(samples), device=samples.device).split(_BLOCK_SIZE):
        for columns in torch.arange(len(reference), device=samples.device).split(_BLOCK_SIZE):
            squared = squared_distances_in_half(samples[rows], reference[columns])
            fake_inside[rows] |= (squared <= real_radii[columns]).any(1)
            real_inside[columns] |= (squared <= fake_radii[rows, None]).any(0)
    return PrecisionRecall(
        precision=float(fake_inside.double().mean()),
        recall=float(real_inside.double().mean()),
        num_neighbours=num_neighbours,
    )


def squared_distances_in_half(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Compute squared distances with float16's rounding, as float32; in float32 alone where any is not finite."""
    for dtype in (torch.float16, torch.float32):
        x, y = a.to(dtype).float(), b.to(dtype).float()
        product = (x @ y.T).to(dtype)
        x_norm, y_norm = x.square().to(dtype).float().sum(1).to(dtype), y.square().to(dtype).float().sum(1).to(dtype)
        squared = ((x_norm[:, None] - 2 * product) + y_norm).clamp_min(0).float()
        if bool(squared.isfinite().all()):
            break
    return squared


def _squared_radii(features: Float[Tensor, "n d"], num_neighbours: int) -> Float[Tensor, " n"]:
    """Find the distance to the k-th neighbour of each point, where the point itself is the zeroth."""
    radii = []
    for rows in features.split(_BLOCK_SIZE):
        squared = torch.cat([squared_distances_in_half(rows, columns) for columns in features.split(_BLOCK_SIZE)], 1)
        radii.append(squared.topk(num_neighbours + 1, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)
