"""SIGTERM and SIGINT ask a run to stop at the next safe point instead of tearing it down."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        """Nobody did yet."""
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        """True once a signal came."""
        return self.signal_name is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one acts as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: object) -> None:
        request.signal_name = signal.Signals(number).name
        for each, handler in former.items():
            signal.signal(each, handler)

    for number in former:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
