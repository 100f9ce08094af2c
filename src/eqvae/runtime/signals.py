"""Signals that ask a run to stop; imported before anything heavy, so that they are heard from the first moment."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from eqvae.errors import Interrupted


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        """True once a signal came."""
        return self.signal_name is not None


_raised: list[StopRequest] = []
"""Those of the `terminated_by_signal` that we are in. A library may have swallowed what one raised."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one acts as usual."""
    request = StopRequest()
    request.signal_name = next((each.signal_name for each in _raised if each), None)
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


@contextlib.contextmanager
def terminated_by_signal() -> Iterator[StopRequest]:
    """Let SIGTERM stop us like Ctrl-C where nobody has their own way with it; either becomes `Interrupted`."""
    former, request, process = None, StopRequest(), os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != process:  # a forked worker, which is not asked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.signal_name = signal.Signals(number).name
        # No `Interrupted`: it is an Exception, and libraries that are loading something take these for their own.
        raise KeyboardInterrupt(request.signal_name)

    if threading.current_thread() is threading.main_thread():
        former = signal.signal(signal.SIGTERM, stop)
    _raised.append(request)
    try:
        yield request
    except KeyboardInterrupt:
        raise Interrupted(explain_interruption(request)) from None
    finally:
        _raised.remove(request)
        if former is not None:
            signal.signal(signal.SIGTERM, former)


def explain_interruption(asked: StopRequest) -> str:
    """Say which signal it was."""
    return f"{asked.signal_name or 'SIGINT'}; the same command goes on"
