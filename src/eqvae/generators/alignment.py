"""A trained transformer's first and last layers, fitted to the latents of another autoencoder.

z are patches of the old normalized latents and w the new ones' at the same places of the same images, as vectors. Both
processes are noised at the same times, with noises that belong together as the latents do:

    z_t = alpha z + sigma epsilon            w_t = alpha w + sigma (Q epsilon + ...)

where Q is the orthogonal map nearest to the covariance of w and z (Procrustes): noise has to stay white, whatever the
latents go through. Then the first layer is given the affine map from w_t to z_t, and the last one that from the old
target `a z + b epsilon` to the new one `a w + b Q epsilon`, by least squares over images, noise and times. If w = Q z,
both are exact. Where the target is noise alone (a = 0) the last map is Q itself; DiT's variances follow it with Q's
squares, as variances do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from eqvae.generators.protocol import Coupling
from eqvae.generators.transformer import TransformerConfig

ENDS = (FIRST_LAYER, LAST_LAYER) = ("x_embedder.proj", "final_layer.linear")


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """How the generator that `--init` names goes on with latents that it was not trained on."""

    old_latents: Path | None = None
    """With --init: the cache that RUN was trained on. First and last layers are fitted to map between its latents and
    the new ones of the same images. `eqvae adapt` finds it."""

    align_images: int | None = None
    """With --old-latents: at most so many images, spread evenly; None: 10,000."""

    align_steps: int | None = None
    """With --init: the first of the steps, in which first and last layers alone are trained; None: none."""

    lora_rank: int | None = None
    """With --init: train adapters of this rank in place of the blocks' weights (LoRA, extra `lora`), and first and last
    layers whole; None: train everything. What is exported has the adapters merged."""


@dataclass(frozen=True, kw_only=True)
class PatchMoments:
    """Means and covariances of matched patches, old `z` and new `w`, in the order (channel, row, column)."""

    mean_z: Float64[Tensor, " old"]
    mean_w: Float64[Tensor, " new"]
    zz: Float64[Tensor, "old old"]
    wz: Float64[Tensor, "new old"]
    ww: Float64[Tensor, "new new"]

    def explained(self) -> tuple[float, float]:
        """Shares of the old latents' variance that are affine in the new ones, patch by patch, and the reverse."""
        zz, wz, ww = self.zz, self.wz, self.ww
        of_z = (torch.linalg.pinv(ww, hermitian=True) @ wz).mul(wz).sum() / zz.trace()
        of_w = (torch.linalg.pinv(zz, hermitian=True) @ wz.T).mul(wz.T).sum() / ww.trace()
        return of_z.item(), of_w.item()


@dataclass(frozen=True, kw_only=True)
class AffineMap:
    """`matrix @ x + offset`."""

    matrix: Float64[Tensor, "out in"]
    offset: Float64[Tensor, " out"]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What the first layer sees through, and what the last one speaks through."""

    of_input: AffineMap
    """New noisy patches to old ones."""

    of_output: AffineMap
    """Old targets to new ones."""

    noise: Float64[Tensor, "new old"]
    """Q."""


def align(moments: PatchMoments, coupling: Coupling) -> Alignment:
    """Fit both maps; see the module's docstring."""
    left, _, right = torch.linalg.svd(moments.wz, full_matrices=False)
    noise = left @ right
    seen = _mixed(moments, noise, coupling.alpha, coupling.alpha_square, coupling.sigma_square)
    said = _mixed(moments, noise, coupling.a, coupling.a_square, coupling.b_square)
    return Alignment(
        of_input=_fit(seen.wz.T, seen.ww, out=seen.mean_z, given=seen.mean_w),
        of_output=_fit(said.wz, said.zz, out=said.mean_w, given=said.mean_z),
        noise=noise,
    )


def _mixed(latents: PatchMoments, noise: Tensor, scale: float, square: float, noise_square: float) -> PatchMoments:
    """Moments of latents that are scaled and noised, over all times."""
    z, w, spread = latents.mean_z, latents.mean_w, square - scale**2
    return PatchMoments(
        mean_z=scale * z,
        mean_w=scale * w,
        zz=square * latents.zz + spread * z.outer(z) + noise_square * torch.eye(len(z)).double(),
        wz=square * latents.wz + spread * w.outer(z) + noise_square * noise,
        ww=square * latents.ww + spread * w.outer(w) + noise_square * torch.eye(len(w)).double(),
    )


def _fit(cross: Tensor, own: Tensor, *, out: Tensor, given: Tensor) -> AffineMap:
    """Solve for the affine map of least squares, from covariances and means."""
    matrix = torch.linalg.solve(own, cross, left=False)
    return AffineMap(matrix=matrix, offset=out - matrix @ given)


def fold(
    weights: Mapping[str, Tensor], alignment: Alignment, old: TransformerConfig, new: TransformerConfig
) -> dict[str, Tensor]:
    """Put the maps into a transformer's weights, which are then of latents and patches as in `new`."""
    found, cells = dict(weights), (new.patch_size, new.patch_size)
    seen = weights[f"{FIRST_LAYER}.weight"].double().flatten(1)  # (width, channel row column)
    found[f"{FIRST_LAYER}.weight"] = (seen @ alignment.of_input.matrix).unflatten(1, (new.latents.channels, *cells))
    found[f"{FIRST_LAYER}.bias"] = weights[f"{FIRST_LAYER}.bias"].double() + seen @ alignment.of_input.offset
    shares = alignment.noise.square()
    shares /= shares.sum(1, keepdim=True).clamp(min=1e-6)
    of_variances = AffineMap(matrix=shares, offset=shares.new_zeros(len(shares)))
    maps = (alignment.of_output, of_variances)[: old.out_channels // old.latents.channels]
    for name in ("weight", "bias"):
        last = weights[f"{LAST_LAYER}.{name}"].double()
        # From (row column, half, channel) to a map's order in each half, and back; a bias has one column.
        halves = last.reshape(old.patch_size**2, len(maps), old.latents.channels, -1).permute(1, 2, 0, 3).flatten(1, 2)
        moved = torch.stack([each.matrix @ half for each, half in zip(maps, halves, strict=True)])
        if name == "bias":
            moved += torch.stack([each.offset for each in maps])[..., None]
        laid = moved.unflatten(1, (new.latents.channels, -1)).permute(2, 0, 1, 3)
        found[f"{LAST_LAYER}.{name}"] = laid.reshape(-1, *last.shape[1:])
    return {name: value.to(weights[name].dtype).contiguous() for name, value in found.items()}
