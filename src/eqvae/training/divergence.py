"""Steps that do not go well: one that is not finite, or enormous, ends the run at its last good state; a jump is told.

Both are held against the last steps of this session. A loss is a jump when it lies more than 8 robust deviations
(1.4826 times the median distance from the median, at least 5% of the median) and half the median above the median of
128 steps, after the first 32; it is told once, until it has come back. A term explodes where it is 1,000 times its
median after the first 20 steps.
"""

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from eqvae.errors import NotFiniteError

_WINDOW = 128
_MIN_FOR_JUMP, _JUMP_DEVIATIONS, _JUMP_RATIO, _SMALLEST_DEVIATION = 32, 8.0, 1.5, 0.05
_MIN_FOR_EXPLOSION, _EXPLOSION = 20, 1000.0


@dataclass(frozen=True, kw_only=True)
class Jump:
    """A loss far above the last ones."""

    loss: float

    median: float
    """Of the last steps."""

    deviations: float
    """How many robust deviations it lies above it."""

    def __str__(self) -> str:
        """One line."""
        ratio, deviations = f"{self.loss / self.median:.3g}", f"{self.deviations:.0f}"
        return f"the loss jumped to {self.loss:.4g}, {ratio} times its median of late ({deviations} deviations)"


@dataclass(kw_only=True)
class Guard:
    """Looks at each step before it changes a weight."""

    jump: Jump | None = None
    """Of the last step, where it was one."""

    _past: dict[str, deque[float]] = field(default_factory=dict)
    _is_up: bool = False

    def check(
        self,
        terms: Mapping[str, float],
        *,
        loss: str,
        exploding: Collection[str] = (),
        names: Mapping[str, str] | None = None,
        draws: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Refuse a step one of whose terms, in the order in which they are computed, is not finite or has exploded."""
        for name, value in terms.items():
            past = self._past.setdefault(name, deque(maxlen=_WINDOW))
            usual = median(past) if name in exploding and len(past) >= _MIN_FOR_EXPLOSION else 0.0
            if not math.isfinite(value) or abs(value) > _EXPLOSION * usual > 0:
                began = (names or {}).get(name, name)
                said = ", ".join(f"{each} {number:.4g}" for each, number in terms.items())
                how = f"is 1,000 times its median of {usual:.4g}" if math.isfinite(value) else "is the first"
                raise NotFiniteError(f"{said}: it began with the {began}, which {how}", began, terms, draws)
        self.jump = self._look(terms[loss], self._past[loss])
        for name, value in terms.items():
            self._past[name].append(value)

    def _look(self, value: float, past: Sequence[float]) -> Jump | None:
        if len(past) < _MIN_FOR_JUMP:
            return None
        usual = median(past)
        deviation = max(1.4826 * median(abs(each - usual) for each in past), _SMALLEST_DEVIATION * abs(usual))
        deviations = (value - usual) / deviation if deviation > 0 else 0.0
        was_up, self._is_up = self._is_up, deviations > _JUMP_DEVIATIONS and value > _JUMP_RATIO * usual > 0
        return Jump(loss=value, median=usual, deviations=deviations) if self._is_up and not was_up else None
