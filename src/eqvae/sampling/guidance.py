"""Guidance wraps a prediction and gives a prediction, so that no sampler knows of it.

Noise, velocity and score are affine in the denoised latent with the same coefficients for both of the mixed models, so
`b + scale (a - b)` means the same whatever they predict.

An interval `(low, high)` is inclusive and in the prediction's own time: steps 0 ... 999 of a diffusion, where 999 is
noise, or an interpolant's t in [0, 1], where `Interpolant.time_of_data` says which end is which. REPA guides t in
[0, 0.7] with data at 0; for a SiT checkpoint, with data at 1, the same interval is (0.3, 1). Outside of it nothing is
mixed and nothing more is computed.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.protocol import Predict

Interval = tuple[float | int, float | int]


def classifier_free_guidance(
    predict: Predict,
    scale: float | int,
    null_label: int,
    *,
    interval: Interval | None = None,
    channels: int | None = None,
) -> Predict:
    """Guide a conditional prediction away from the unconditional one (Ho & Salimans, arXiv:2207.12598).

    Args:
        predict: What to guide; called once, with the images and their null twins in one batch.
        scale: 1 for none, which gives `predict` itself; 0 for the unconditional model.
        null_label: Label of the unconditional model: the specification's `num_classes`.
        interval: Times at which to guide (Kynkaanniemi et al., arXiv:2404.07724), or none for all.
        channels: How many of the first channels to guide; none for all of the latent's. The published DiT and SiT code
            guides three of four, and calls it a habit kept for reproducibility.

    Returns:
        The guided prediction. Channels behind the latent's, where the model learns variances, are the conditional's.

    Raises:
        UserError: If the interval is empty or the number of channels not positive.
    """
    _check(interval, channels)
    if scale == 1.0:
        return predict

    def guided(z: Float[Tensor, "n c h w"], t: Tensor, labels: Int64[Tensor, " n"]) -> Float[Tensor, "n c2 h w"]:
        inside = _inside(t, interval)
        if inside is None:
            z_null, t_null = z, t
        elif inside.any():
            z_null, t_null = z[inside], t[inside]
        else:
            return predict(z, t, labels)
        null = torch.full_like(labels[: len(z_null)], null_label)
        both = predict(torch.cat([z, z_null]), torch.cat([t, t_null]), torch.cat([labels, null]))
        return _mixed(both[: len(z)], both[len(z) :], inside, scale, channels or z.shape[1])

    return guided


def autoguidance(
    predict: Predict,
    weak_predict: Predict,
    scale: float | int,
    *,
    interval: Interval | None = None,
    channels: int | None = None,
) -> Predict:
    """Guide a prediction away from that of a weaker version of itself (Karras et al., arXiv:2406.02507, Equation 3).

    Args:
        predict: What to guide.
        weak_predict: A smaller or less trained model of the same data, objective and time.
        scale: 1 for none, which gives `predict` itself.
        interval: Times at which to guide, or none for all.
        channels: How many of the first channels to guide; none for all of the latent's.

    Returns:
        The guided prediction. Channels behind the latent's are those of `predict`.

    Raises:
        UserError: If the interval is empty or the number of channels not positive.
    """
    _check(interval, channels)
    if scale == 1.0:
        return predict

    def guided(z: Float[Tensor, "n c h w"], t: Tensor, labels: Int64[Tensor, " n"]) -> Float[Tensor, "n c2 h w"]:
        inside = _inside(t, interval)
        strong = predict(z, t, labels)
        if inside is None:
            weak = weak_predict(z, t, labels)
        elif inside.any():
            weak = weak_predict(z[inside], t[inside], labels[inside])
        else:
            return strong
        return _mixed(strong, weak, inside, scale, channels or z.shape[1])

    return guided


def _check(interval: Interval | None, channels: int | None) -> None:
    if interval is not None and not interval[0] <= interval[1]:
        raise UserError(f"The guidance interval {interval} is empty", "Give its lower end first")
    if channels is not None and channels < 1:
        raise UserError(f"{channels} channels are to be guided", "Give at least 1, or none for all of them")


def _inside(t: Tensor, interval: Interval | None) -> Tensor | None:
    """Say which images are guided; none stands for all, so that no GPU is waited for."""
    return None if interval is None else (t >= interval[0]) & (t <= interval[1])


def _mixed(a: Tensor, b: Tensor, inside: Tensor | None, scale: float | int, channels: int) -> Tensor:
    """Return `b + scale (a - b)` in the first channels of the images inside, whose rows alone `b` has, else `a`."""
    # At least float32: a prediction that autocasts gives 16 bits, of which the difference would leave few.
    dtype = torch.promote_types(a.dtype, torch.float32)
    mixed, weak = a.to(dtype, copy=True), b[:, :channels].to(dtype)
    rows = slice(None) if inside is None else inside
    mixed[rows, :channels] = weak + scale * (mixed[rows, :channels] - weak)
    return mixed
