"""Equivariance error: how far `tau o E(x)` is from `E(tau o x)` (Section C.3 of arXiv:2502.09509), also in tokens."""

from collections.abc import Callable, Mapping

from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.transforms import ROTATIONS, Interpolation, Transform, evaluation_scales


def equivariance_error(
    transformed_latent: Float[Tensor, "n c h w"], latent_of_transformed: Float[Tensor, "n c h w"]
) -> Float[Tensor, " n"]:
    """Measure one transformation.

    Args:
        transformed_latent: `tau o E(x)`, raw.
        latent_of_transformed: `E(tau o x)`, raw.

    Returns:
        `||tau o E(x) - E(tau o x)||^2 / ||E(tau o x)||^2` for each image: 0 for an equivariant encoder, about 2 for
        unrelated latents of mean zero.
    """
    a, b = transformed_latent.float().flatten(1), latent_of_transformed.float().flatten(1)
    return (a - b).square().sum(1) / b.square().sum(1)


def token_agreement(tokens: Int64[Tensor, "n h w"], others: Int64[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Compare tokens position by position."""
    return (tokens == others).flatten(1).double().mean(1)


def evaluation_transforms(interpolation: Interpolation = "bicubic", antialias: bool = False) -> dict[str, Transform]:
    """Name T_r and T_s of Section C.3 as the keys of `metrics.json` do."""
    named: dict[str, Transform] = {f"rotation_{90 * tau.quarter_turns}": tau for tau in ROTATIONS}
    return named | {f"scale_{float(tau.vertical):g}": tau for tau in evaluation_scales(interpolation, antialias)}


def equivariance_figures(
    encode: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n 3 h w"],
    z: Float[Tensor, "n c h2 w2"],
    transforms: Mapping[str, Transform],
    *,
    tokenize: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Float[Tensor, " n"]]:
    """Measure several transformations of the same images, as `metrics.json` names them."""
    figures = {}
    for name, tau in transforms.items():
        transformed, encoded = tau(z), encode(tau(x))
        figures[f"equivariance_error_{name}"] = equivariance_error(transformed, encoded)
        if tokenize is not None:
            figures[f"token_agreement_{name}"] = token_agreement(tokenize(transformed), tokenize(encoded))
    return figures
