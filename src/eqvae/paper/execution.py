"""Going through a plan: finished runs are passed over, each of the others is taken by one taker at a time.

A taker is a process, or the processes that torchrun started together. A run is taken under a lock file below the plan's
root, which the system frees when its holder dies; so several machines that share the root take different runs.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from eqvae.errors import Interrupted, UserError
from eqvae.paper.planned import FOR_ONE_PROCESS, Plan, PlannedRun, perform
from eqvae.runtime.processes import Processes

LOCKS = ".locks"

_POLL_SEC = 2.0
_DONE, _WAIT = "", "."  # no run is called so


def execute(
    plan: Plan, root: Path, processes: Processes, *, after_each: Callable[[PlannedRun], None] = lambda run: None
) -> list[str]:
    """Do all runs of a plan that are not finished, beside whoever else does so."""
    runs = {run.name: run for run in plan.runs}
    done: list[str] = []
    with _terminated_by_signal():
        while True:
            lock = None
            try:
                choice = _DONE
                if processes.is_first:
                    choice, lock = _take_next(plan, root)
                choice = processes.gather(choice)[0]
                if choice == _DONE:
                    return done
                if choice == _WAIT:
                    time.sleep(_POLL_SEC)
                    continue
                run = runs[choice]
                if processes.is_first:
                    _say(plan, run)
                _perform(run, processes)
                done.append(run.name)
                if processes.is_first:
                    after_each(run)
            finally:
                if lock is not None:
                    lock.release()


def lock_path(root: Path, run: PlannedRun) -> Path:
    """Name a run's lock file."""
    return root / LOCKS / f"{run.name.replace('/', '--')}.lock"


def _take_next(plan: Plan, root: Path) -> tuple[str, FileLock | None]:
    """Take the first run that is ready and that nobody else has taken; say whether there is nothing left at all."""
    unfinished = plan.unfinished
    for run in unfinished:
        if not run.is_ready:
            continue
        path = lock_path(root, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if not run.is_finished:  # somebody may have finished it since we looked
            return run.name, lock
        lock.release()
    return (_WAIT if unfinished else _DONE), None


def _perform(run: PlannedRun, processes: Processes) -> None:
    """Do a run together, or let the first process do it; an error names the run."""
    try:
        if processes.is_first or not isinstance(run.config, FOR_ONE_PROCESS):
            perform(run)
            return
        while not run.is_finished:  # where the first process fails, torchrun ends us
            time.sleep(_POLL_SEC)
    except UserError as error:
        raise UserError(f"run '{run.name}': {error}") from None
    except Interrupted as stop:
        raise Interrupted(f"in run '{run.name}': {stop}") from None
    except KeyboardInterrupt as stop:
        raise Interrupted(f"in run '{run.name}': {_explain(stop)}") from None


def _say(plan: Plan, run: PlannedRun) -> None:
    number = len(plan.runs) - len(plan.unfinished) + 1
    print(f"run {number} of {len(plan.runs)}: {run.command} {run.name}", file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """Let SIGTERM stop us like Ctrl-C where no stage has its own way with it; either becomes `Interrupted`."""
    former = None

    def stop(number: int, frame: object) -> None:
        # No `Interrupted`: it is an Exception, and libraries that are loading something take these for their own.
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as caught:
        raise Interrupted(_explain(caught)) from None
    finally:
        if former is not None:
            signal.signal(signal.SIGTERM, former)


def _explain(stop: KeyboardInterrupt) -> str:
    return f"{stop.args[0] if stop.args else 'SIGINT'}; the same command goes on"
