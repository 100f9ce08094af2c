"""Progress: a bar with rate and time left on a terminal, plain lines when piped."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Shows how far long work has come, on standard error."""

    def __init__(self, title: str, *, total: int, start: int = 0, unit: str = "step", every_sec: float = 15.0) -> None:
        """Start."""
        self._title, self._total, self._start, self._unit, self._every_sec = title, total, start, unit, every_sec
        self._done = start
        self._began_sec = self._last_sec = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=title, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        """Show."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int = 1, **figures: float) -> None:
        """Say that more is done."""
        self._done += units
        if self._bar is not None:
            if figures:
                self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
            self._bar.update(units)
            return
        now_sec = time.monotonic()
        if self._done >= self._total or now_sec - self._last_sec >= self._every_sec:
            self._last_sec = now_sec
            self._print_line(now_sec - self._began_sec, figures)

    def _print_line(self, elapsed_sec: float, figures: dict[str, float]) -> None:
        rate = (self._done - self._start) / max(elapsed_sec, 1e-9)
        left_sec = (self._total - self._done) / max(rate, 1e-9)
        shown = "".join(f", {name} {value:.4g}" for name, value in figures.items())
        done = f"{self._title}: {self._done}/{self._total} {self._unit}s, {rate:.3g} {self._unit}s/s"
        print(f"{done}, {left_sec:.0f} s left{shown}", file=sys.stderr, flush=True)  # noqa: T201


def say(text: str) -> None:
    """Print a line without tearing a bar."""
    tqdm.write(text, file=sys.stderr)
