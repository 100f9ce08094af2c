"""Guidance wraps a prediction and gives a prediction, so that no sampler knows of it.

Noise, velocity and score are affine in the denoised latent with the same coefficients for both of the mixed models, so
`b + scale (a - b)` means the same whatever they predict.

An interval `(low, high)` is inclusive and in the prediction's own time: steps 0 ... 999 of a diffusion, where 999 is
noise, or an interpolant's t in [0, 1], where `Interpolant.time_of_data` says which end is which. REPA guides t in
[0, 0.7] with data at 0; for a SiT checkpoint, with data at 1, the same interval is (0.3, 1). Outside of it nothing is
mixed and nothing more is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eqvae.errors import UserError
from eqvae.generators.protocol import Predict

Interval = tuple[float | int, float | int]

Rows = slice | Tensor
"""Which images are guided."""


def decided_at(predict: Predict, t: float) -> Predict:
    """Let a guided prediction be guided as at another time: REPA's Heun decides at a step's beginning for all of it."""
    return replace(predict, decide_at=t) if isinstance(predict, _Guided) else predict


def classifier_free_guidance(
    predict: Predict,
    scale: float | int,
    null_label: int,
    *,
    interval: Interval | None = None,
    channels: int | None = None,
) -> Predict:
    """Guide a conditional prediction away from the unconditional one (Ho & Salimans, arXiv:2207.12598).

    `predict` is called once, with the images and their null twins (`null_label`: the specification's `num_classes`)
    in one batch. Scale 1 gives `predict` itself, 0 the unconditional model. `interval` is of Kynkaanniemi et al.
    (arXiv:2404.07724). The published DiT and SiT code guides the first three of four `channels`, and calls it a habit
    kept for reproducibility; None: all of the latent's. What a model says of variances is the conditional's.
    """

    def both(z: Tensor, t: Tensor, labels: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        null = torch.full_like(labels[rows], null_label)
        predicted = predict(torch.cat([z, z[rows]]), torch.cat([t, t[rows]]), torch.cat([labels, null]))
        return predicted[: len(z)], predicted[len(z) :]

    return _guide(predict, both, scale, interval, channels)


def autoguidance(
    predict: Predict,
    weak_predict: Predict,
    scale: float | int,
    *,
    interval: Interval | None = None,
    channels: int | None = None,
) -> Predict:
    """Guide a prediction away from that of a weaker version of itself (Karras et al., arXiv:2406.02507, Equation 3).

    `weak_predict` is a smaller or less trained model of the same data, objective and time; the rest is as above.
    """

    def both(z: Tensor, t: Tensor, labels: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return predict(z, t, labels), weak_predict(z[rows], t[rows], labels[rows])

    return _guide(predict, both, scale, interval, channels)


def _guide(
    predict: Predict,
    both: Callable[[Tensor, Tensor, Tensor, Rows], tuple[Tensor, Tensor]],
    scale: float | int,
    interval: Interval | None,
    channels: int | None,
) -> Predict:
    """Mix what `both` predicts for all images and, by the weaker model, for those inside the interval."""
    if interval is not None and not interval[0] <= interval[1]:
        raise UserError(f"The guidance interval {interval} is empty", "Give its lower end first")
    if channels is not None and channels < 1:
        raise UserError(f"{channels} channels are to be guided", "Give at least 1, or none for all of them")
    if scale == 1.0:
        return predict

    return _Guided(predict=predict, both=both, scale=scale, interval=interval, channels=channels)


@final
@dataclass(frozen=True, kw_only=True)
class _Guided:
    """A prediction, guided."""

    predict: Predict
    both: Callable[[Tensor, Tensor, Tensor, Rows], tuple[Tensor, Tensor]]
    scale: float | int
    interval: Interval | None
    channels: int | None
    decide_at: float | None = None
    """The time that the interval is asked at; None: the prediction's own."""

    def __call__(
        self, z: Float[Tensor, "n c h w"], t: Tensor, labels: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n c2 h w"]:
        rows: Rows = slice(None)  # without an interval no GPU is waited for
        if self.interval is not None:
            times = t if self.decide_at is None else torch.full_like(t, self.decide_at)
            rows = (times >= self.interval[0]) & (times <= self.interval[1])
            if not rows.any():
                return self.predict(z, t, labels)
        a, b = self.both(z, t, labels, rows)
        num_guided = self.channels or z.shape[1]
        # At least float32: a prediction that autocasts gives 16 bits, of which the difference would leave few.
        dtype = torch.promote_types(a.dtype, torch.float32)
        mixed, weak = a.to(dtype, copy=True), b[:, :num_guided].to(dtype)
        mixed[rows, :num_guided] = weak + self.scale * (mixed[rows, :num_guided] - weak)
        return mixed
