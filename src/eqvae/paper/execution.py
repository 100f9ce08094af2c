"""Going through a plan: finished runs are passed over, each other is taken by one taker at a time.

A taker is a process, or the processes that torchrun started together. A run is taken under a lock file below the plan's
root, which the system frees when its holder dies; so several machines that share the root take different runs.
`cluster` hands the runs to Ray instead, under the same lock files.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eqvae.artifacts.files import write_json
from eqvae.artifacts.names import CONFIG
from eqvae.autoencoders import load_autoencoder
from eqvae.errors import Interrupted, UserError
from eqvae.images import open_images
from eqvae.images.image_sets import open_reference
from eqvae.images.sources import Split
from eqvae.losses.discriminator_files import begin_discriminator
from eqvae.paper.costs import on_meta
from eqvae.paper.equalize import equalize
from eqvae.paper.plan import Plan, PlannedRun, write_reference
from eqvae.paper.setting import GIVEN_LATER
from eqvae.runs.encode import encode
from eqvae.runs.evaluate import evaluate
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runs.finetune_checks import check_sizes
from eqvae.runs.sample import sample
from eqvae.runs.score import score
from eqvae.runs.train import train
from eqvae.runtime.device import choose_device
from eqvae.runtime.journal import say, write_environment
from eqvae.runtime.processes import Processes, join_processes
from eqvae.runtime.run_folder import LOCKS, RunFolder, flat, hold_output_folder
from eqvae.runtime.signals import StopRequest, explain_interruption, terminated_by_signal
from eqvae.training.adapters import check_peft

COMMANDS: Mapping[str, Callable[[Any], object]] = {
    "reference": write_reference,
    "equalize": equalize,
    **{function.__name__: function for function in (finetune, evaluate, encode, train, sample, score)},
}
"""What does each kind of run."""

_POLL_SEC = 2.0
_DONE, _WAIT = "", "."  # no run is called so


def carry_out(plan: Plan, config: Any, command: str, write: Callable[[PlannedRun | None], object]) -> bool:
    """Do what is left of a plan for a command, and write what it shows after each run; is this the first process?"""
    device = choose_device(config.device if config.cluster is None else "cpu")
    _check_cluster(config)
    _claim_root(config, command)
    plan.check_saved()
    check_inputs(plan, command)
    processes = join_processes(device)
    processes.wait()

    def write_alone(run: PlannedRun | None) -> None:
        with _alone_at(config.out):
            write(run)

    if processes.is_first:
        with _alone_at(config.out):
            write_json(config.out / CONFIG, flat(config) | {"command": command})
            write_environment(config.out, device=processes.device, seed=None, num_processes=processes.count)
        write_alone(None)
    processes.wait()
    with hold_output_folder(config.out, hold=False):  # runs are locked one by one; all end where the root is removed
        if config.cluster is None:
            execute(plan, config.out, processes, after_each=write_alone)
            return processes.is_first
        from eqvae.paper.cluster import execute_on_cluster  # it needs an optional extra

        execute_on_cluster(
            plan,
            config.out,
            address=config.cluster,
            device=config.device,
            processes_per_run=config.processes_per_run,
            after_each=write_alone,
        )
    return True


@contextlib.contextmanager
def _alone_at(root: Path) -> Iterator[None]:
    """Write what a plan shows while no other taker does, and remove what a killed one had begun to write."""
    (root / LOCKS).mkdir(parents=True, exist_ok=True)
    with FileLock(root / LOCKS / "items.lock"):
        for folder in (".", "table*/**", "figure*/**", "cost/**"):
            for leftover in root.glob(f"{folder}/.*.part"):
                leftover.unlink(missing_ok=True)
        yield


def _check_cluster(config: Any) -> None:
    """Refuse processes that nobody would start, or that would be started twice."""
    if config.processes_per_run < 1:
        raise UserError(f"--processes-per-run is {config.processes_per_run}", "It must be at least 1")
    if config.cluster is None and config.processes_per_run > 1:
        raise UserError("--processes-per-run is of runs on a --cluster", "Without one, start the command by torchrun")
    if config.cluster is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--cluster starts processes itself", "Start the command alone, with --processes-per-run")


def check_inputs(plan: Plan, command: str = "reproduce") -> None:
    """Open what the runs that are left will read, so that what is wrong is told before anything is written."""
    made = {str(run.folder) for run in plan.runs}
    checks: dict[tuple[str, str], Callable[[], object]] = {}
    for run in plan.unfinished:
        config: Any = run.config
        data: dict[str, str] = {}
        if run.command == "finetune":
            _check_finetuning(run)
        if run.command in ("finetune", "equalize"):
            data = {"--finetune-data": config.data, "--validation-data": config.validation_data}
        elif run.command in ("evaluate", "encode"):
            data = {"--validation-data" if run.command == "evaluate" else "--data": config.data}
        elif run.command == "reference":
            open_it = partial(open_reference, config.reference, image_size_px=config.image_size)
            checks["--reference-data", config.reference] = open_it
        if data and config.autoencoder not in made:
            checks["--autoencoder", config.autoencoder] = partial(load_autoencoder, config.autoencoder)
        for flag, value in data.items():
            split: Split = "evaluation" if flag == "--validation-data" else "train"
            checks[flag, value] = partial(open_images, value, split=split)
    for flag, value in checks:
        if value == GIVEN_LATER:
            raise UserError(f"this scale needs {flag}", f"See 'eqvae {command} --help'")
    for check in checks.values():
        check()


def _check_finetuning(run: PlannedRun) -> None:
    """Refuse a fine-tuning whose images become too small for what looks at them, or that lacks a package."""
    config, autoencoder = run.config, on_meta(run.architecture)
    assert isinstance(config, FinetuneConfig)
    try:
        config = config.resolved()
        training = config.training
        if training.lora_rank:
            check_peft()
        discriminator = begin_discriminator(training.adversarial, training.seed, autoencoder.image_channels)
        check_sizes(config, autoencoder, discriminator, num_processes=1)
    except UserError as error:
        raise UserError(f"run '{run.name}': {error}") from None


def _claim_root(config: Any, command: str) -> None:
    """Refuse a root that is something else, or of another scale."""
    root = config.out
    saved = RunFolder.claim(root, command).saved
    if saved is not None and saved.get("scale") != config.scale:
        problem = f"--out '{root}' holds runs of --scale {saved.get('scale')}, not {config.scale}"
        raise UserError(problem, f"Use --scale {saved.get('scale')}, or choose another --out")


def perform(run: PlannedRun) -> None:
    """Do a run, or go on with it."""
    COMMANDS[run.command](run.resolved())


def execute(
    plan: Plan, root: Path, processes: Processes, *, after_each: Callable[[PlannedRun], object] = lambda run: None
) -> list[str]:
    """Do all runs of a plan that are not finished, beside whoever else does so."""
    runs = {run.name: run for run in plan.runs}
    done: list[str] = []
    with terminated_by_signal() as asked:
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
                    number = len(plan.runs) - len(plan.unfinished) + 1
                    say(f"run {number} of {len(plan.runs)}: {run.command} {run.name}")
                perform_named(run, asked)
                done.append(run.name)
                if processes.is_first:
                    after_each(run)
            finally:
                if lock is not None:
                    lock.release()


def lock_path(root: Path, run: PlannedRun) -> Path:
    """Name a run's lock file."""
    return root / LOCKS / f"{run.name.replace('/', '--')}.lock"


def _lock_of(run: PlannedRun, root: Path) -> FileLock:
    """Make the lock of a run, which nobody holds yet."""
    path = lock_path(root, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def _take_next(plan: Plan, root: Path) -> tuple[str, FileLock | None]:
    """Take the first run that is ready and that nobody else has taken; say whether there is nothing left at all."""
    unfinished = plan.unfinished
    for run in unfinished:
        if not run.is_ready:
            continue
        lock = _lock_of(run, root)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if not run.is_finished:  # somebody may have finished it since we looked
            return run.name, lock
        lock.release()
    return (_WAIT if unfinished else _DONE), None


@contextlib.contextmanager
def take(run: PlannedRun, root: Path) -> Iterator[None]:
    """Take a run, once whoever has it has let it go."""
    lock = _lock_of(run, root)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"run '{run.name}' is in other hands; waiting for it")
        lock.acquire(poll_interval=_POLL_SEC)
    try:
        yield
    finally:
        lock.release()


def perform_named(run: PlannedRun, asked: StopRequest, do: Callable[[PlannedRun], object] | None = None) -> None:
    """Do a run, in this process or as told; an error names it."""
    try:
        (do or perform)(run)
    except Interrupted as stop:
        raise Interrupted(f"in run '{run.name}': {stop}") from None
    except KeyboardInterrupt:
        raise Interrupted(f"in run '{run.name}': {explain_interruption(asked)}") from None
    except Exception as error:
        if asked:  # a library may turn the interruption into an error of its own, which we may take for damage
            raise Interrupted(f"in run '{run.name}': {explain_interruption(asked)}") from None
        if isinstance(error, UserError):
            raise UserError(f"run '{run.name}': {error}") from None
        raise
