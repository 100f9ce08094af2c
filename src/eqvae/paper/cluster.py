"""A plan on several machines or GPUs: each run is a task of Ray, which knows what waits for what and what is free.

Retries where a machine was lost, GPUs for each run and the dashboard are Ray's. The lock files of `execution` stay as a
guard: a run that another plan has taken, or that a lost machine has not yet let go, is waited for, never done twice.
The folder in which the command was started, and `--out`, have to be the same ones on all machines.
"""

import contextlib
import logging
import os
import platform
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eqvae.artifacts.names import CONFIG
from eqvae.errors import Interrupted, UserError
from eqvae.paper.execution import perform_named, take
from eqvae.paper.plan import Plan, PlannedRun
from eqvae.runtime.company import leave_company
from eqvae.runtime.journal import say
from eqvae.runtime.signals import terminated_by_signal

NUM_RETRIES = 3
"""Of a run whose machine or process was lost; it goes on from its last checkpoint."""

_STOP_SEC = 120.0
"""How long runs may take to write their checkpoints after Ctrl-C or SIGTERM."""


def execute_on_cluster(
    plan: Plan,
    root: Path,
    *,
    address: str,
    device: str = "auto",
    processes_per_run: int = 1,
    after_each: Callable[[PlannedRun], object] = lambda run: None,
) -> list[str]:
    """Do all runs of a plan that are not finished, as many at a time as the cluster has room for."""
    done: list[str] = []
    with _connected(address) as ray, terminated_by_signal():
        given = _resources(ray, device, processes_per_run)
        task = ray.remote(max_retries=NUM_RETRIES, retry_exceptions=[Interrupted], **given)(_perform_here)
        pending: dict[Any, PlannedRun] = {}
        refs: dict[str, Any] = {}
        try:
            for run in plan.unfinished:
                needs = [refs[need.name] for need in run.needs if need.name in refs]
                lean = _without_architectures(run)
                refs[run.name] = task.options(name=run.name).remote(lean, root, Path.cwd(), processes_per_run, *needs)
                pending[refs[run.name]] = run
            while pending:
                (ref,), _ = ray.wait(list(pending), num_returns=1)
                run = pending[ref]
                _raise_its_own(ray, ref, run)
                del pending[ref]
                done.append(run.name)
                say(
                    f"run {len(plan.runs) - len(plan.unfinished)} of {len(plan.runs)} is done: {run.command} {run.name}"
                )
                after_each(run)
        finally:
            _stop(ray, list(pending))
    return done


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Join a cluster, and leave it; one that this process has joined already is used as it is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of a future version
    try:
        import ray
    except ImportError:
        raise UserError("--cluster needs Ray, which is not installed", "pip install 'eqvae[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    try:
        # None: the cluster of RAY_ADDRESS or of `ray start` on this machine; where there is none, this machine alone.
        ray.init(address=None if address == "auto" else address, logging_level=logging.WARNING)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        mend = "Start one with 'ray start --head', or give --cluster auto"
        raise UserError(f"there is no Ray cluster at '{address}' ({reason})", mend) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _resources(ray: Any, device: str, processes_per_run: int) -> dict[str, int]:
    """Say what a run takes: a core and, where the cluster has GPUs, one of these for each of its processes."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {kind: int(max((machine.get(kind, 0) for machine in machines), default=0)) for kind in ("CPU", "GPU")}
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} can't be chosen on a cluster", "Ray shares the GPUs out: --device auto")
    wants_gpu = device == "cuda" or (device == "auto" and most["GPU"] > 0)
    kind = "GPU" if wants_gpu else "CPU"
    if most[kind] < processes_per_run:
        raise UserError(
            f"a run takes {processes_per_run} {kind}s, and no machine of the cluster has more than {most[kind]}",
            "Give a smaller --processes-per-run" if most[kind] else "Give another --device",
        )
    return {"num_cpus": processes_per_run, "num_gpus": processes_per_run if wants_gpu else 0}


def _without_architectures(run: PlannedRun) -> PlannedRun:
    """Leave out what only estimates and the order of runs read: networks are no message to send."""

    def lean(other: PlannedRun | None) -> PlannedRun | None:
        return None if other is None else replace(other, architecture=None, needs=())

    return replace(
        run, architecture=None, needs=tuple(filter(None, map(lean, run.needs))), scaled_as=lean(run.scaled_as),
        deviation_of=lean(run.deviation_of), spectrum_of=lean(run.spectrum_of),
    )  # fmt: skip


def _raise_its_own(ray: Any, ref: Any, run: PlannedRun) -> None:
    """Pass on how a run ended: its own error, or that it could not be done."""
    try:
        ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, Interrupted)):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        mend = "The same command goes on; 'ray status' shows the cluster"
        raise UserError(f"run '{run.name}' was lost {NUM_RETRIES + 1} times ({reason})", mend) from None


def _stop(ray: Any, refs: list[Any]) -> None:
    """Let no further run begin, and wait until those under way have written their checkpoints."""
    for ref in reversed(refs):
        ray.cancel(ref, force=False)  # in a run it is a Ctrl-C
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=_STOP_SEC)


# On the machine that Ray chose ---------------------------------------------------------------------------------------


def _perform_here(run: PlannedRun, root: Path, started_in: Path, num_processes: int, *needs: object) -> None:
    """Do a run, or go on with it, where nobody else does; `needs` are there once those runs are finished."""
    with contextlib.suppress(OSError):
        os.chdir(started_in)
    if not (root / CONFIG).is_file():
        where = f"machine '{platform.node()}' does not see '{root if root.is_absolute() else started_in / root}'"
        raise UserError(where, "Start the command, and give --out, in a folder that all machines share")
    with terminated_by_signal() as asked, take(run, root):
        if not run.is_finished:
            perform_named(run, asked, _in_processes(num_processes) if num_processes > 1 else None)


def _in_processes(count: int) -> Callable[[PlannedRun], None]:
    """Do a run with several processes of this machine, as torchrun starts them."""

    def perform_together(run: PlannedRun) -> None:
        launch = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=str(uuid.uuid4()), rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=0, start_method="spawn",
        )  # fmt: skip
        try:
            outcomes = elastic_launch(launch, perform_and_tell)(run)
        except SignalException as stop:
            raise Interrupted(f"{stop.sigval.name}; the same command goes on") from None
        for error in outcomes.values():
            if error is not None:
                raise error

    return perform_together


def perform_and_tell(run: PlannedRun) -> Exception | None:
    """Do a process's part of a run; what ends it on purpose is told by the caller."""
    from eqvae.paper import execution

    error: Exception | None = None
    try:
        execution.perform(run)
    except (UserError, Interrupted) as raised:
        error = raised
    leave_company(is_done=error is None)
    return error
