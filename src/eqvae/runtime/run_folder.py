"""A run's output folder and its configuration, for every command: claimed, compared, held, written.

    folder = RunFolder.claim(config.out, "train")            # refuses a folder that is not this command's
    folder.check_same(config, FREE_TO_CHANGE)                # refuses a run under other flags
    if folder.figures is not None:
        return folder.figures                                # it has finished
    ...                                                      # whatever fails here leaves nothing behind
    with folder.hold(config, processes, seed=config.seed, fingerprint=...):   # config.json and environment.json, locked
        ...

Configurations may nest; their flags and their `config.json` are flat.
"""

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from eqvae.artifacts.files import (
    check_writable,
    guard_folder,
    is_leftover,
    read_json,
    remove_leftovers,
    to_plain,
    write_json,
)
from eqvae.artifacts.names import CONFIG, ENVIRONMENT, JOURNAL, METRICS, TENSORBOARD, VALIDATION
from eqvae.errors import UserError
from eqvae.runtime.journal import say, write_environment
from eqvae.runtime.processes import Processes, notice_lost_process

Config = TypeVar("Config")

_PATIENCE_SEC = 15.0
"""A process that ends may still be writing its last checkpoint."""

_BEFORE_RESULTS = frozenset({CONFIG, ENVIRONMENT, JOURNAL, VALIDATION, TENSORBOARD})
"""What a command writes before its first result, and writes again where it begins again."""

LOCKS = ".locks"
"""Folder of a plan's lock files, one for each of its runs."""

_held: set[int] = set()
"""Descriptors of the folders that this process holds."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder that a command writes into."""

    path: Path

    command: str

    saved: Mapping[str, Any] | None
    """`config.json` of an earlier session that left a result; None in a new folder, or in one that was only begun."""

    is_finished: bool
    """Whether its figures are there too."""

    @classmethod
    def claim(cls, path: Path, command: str) -> "RunFolder":
        """Find a new folder, an empty one, or one of the same command, and refuse any other.

        A folder in which a command was refused, or killed, before its first result is nobody's.
        """
        if not isinstance(path, Path):
            raise UserError(f"out is {path!r}, no pathlib.Path", f"Give Path({path!r})")
        saved = None
        if (path / CONFIG).is_file():
            saved = read_json(path / CONFIG)
            if "command" in saved and not has_result(path):
                saved = None
            elif saved.get("command") != command:
                owner = f"belongs to 'eqvae {saved['command']}'" if "command" in saved else "holds something else"
                raise UserError(f"--out '{path}' {owner}", "Choose another folder")
        elif path.exists() and (not path.is_dir() or any(map(_is_something, path.iterdir()))):
            raise UserError(f"--out '{path}' exists and holds no 'eqvae {command}' run", "Choose another folder")
        check_writable(path, "--out")
        is_finished = saved is not None and (path / METRICS).exists()
        return cls(path=path, command=command, saved=saved, is_finished=is_finished)

    def keep_choices(self, config: Config, *names: str) -> Config:
        """Give fields that are None, and would be chosen, the values that the run chose when it began."""
        kept = {name: self.saved[name] for name in names if self.saved is not None and self.saved.get(name) is not None}
        return change_flat(config, **{name: kept[name] for name in kept if flat_value(config, name) is None})

    def check_same(self, config: Any, free_to_change: Collection[str]) -> None:
        """Refuse to resume a run under another configuration."""
        if self.saved is not None:
            check_same_run(self.saved, config, free_to_change)

    def differs(self, **identity: object) -> bool:
        """Whether an earlier session began from something else, a fingerprint say."""
        return self.saved is not None and any(self.saved.get(name) != value for name, value in identity.items())

    def contradicts(self, **identity: object) -> bool:
        """Whether an earlier session wrote down something else; what an older version did not write agrees."""
        return self.differs(**{name: value for name, value in identity.items() if name in (self.saved or {})})

    @property
    def figures(self) -> dict[str, Any] | None:
        """`metrics.json` of a run that has finished."""
        return read_json(self.path / METRICS) if self.is_finished else None

    def figures_after(self, max_steps: int) -> dict[str, Any] | None:
        """`metrics.json` of a run that has taken so many steps; None where some are left to take."""
        figures = self.figures
        done = 0 if figures is None else figures["num_steps"]
        if done > max_steps:
            raise UserError(
                f"'{self.path}' has taken {done} steps, more than --max-steps {max_steps}",
                "Give as many or more, or another --out",
            )
        return figures if done == max_steps else None

    @contextlib.contextmanager
    def hold(
        self, config: Any, processes: Processes, *, seed: int | None, anew: Collection[str] = (), **identity: object
    ) -> Iterator[None]:
        """Make the folder, keep other processes out of it, and write `config.json` and `environment.json`.

        `anew` names files that come back last: whoever finds them finds a whole run.
        """
        processes.wait()  # the folder is as all of them found it until here
        if processes.is_first:
            self.path.mkdir(parents=True, exist_ok=True)
        processes.wait()
        with hold_output_folder(self.path, hold=processes.is_first):
            if processes.is_first:
                self._check_unchanged()
                remove_leftovers(self.path)
                for name in (*anew, *(() if self.saved is not None else _BEFORE_RESULTS - {CONFIG})):
                    _remove(self.path / name)
                write_json(self.path / CONFIG, flat(config) | {"command": self.command} | identity)
                write_environment(self.path, device=processes.device, seed=seed, num_processes=processes.count)
            processes.wait()
            with notice_lost_process(f"the same command goes on from what is in '{self.path}'"):
                yield

    def _check_unchanged(self) -> None:
        """Refuse to go on from what was found before another process, which was waited for, wrote more."""
        now = RunFolder.claim(self.path, self.command)
        if (now.saved, now.is_finished) != (self.saved, self.is_finished):
            raise UserError(
                f"Another process has been writing into '{self.path}' meanwhile", "Run the same command again"
            )


_DESKTOPS = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))
"""Files that file managers leave wherever somebody looks."""


def has_result(folder: Path) -> bool:
    """Whether a command's folder holds more than what is written before the first result."""
    return any(path.name not in _BEFORE_RESULTS and _is_something(path) for path in folder.iterdir())


def _is_something(path: Path) -> bool:
    """Whether a path is more than a killed process's or the desktop's leftovers, lock files and empty folders."""
    if is_leftover(path) or path.name == LOCKS or path.name in _DESKTOPS or path.name.startswith(".nfs"):
        return False
    return not path.is_dir() or path.is_symlink() or any(map(_is_something, path.iterdir()))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold_output_folder(folder: Path, *, hold: bool = True) -> Iterator[None]:
    """Keep a second process from writing into a folder while this one does, and this one from writing elsewhere.

    The lock is the system's, on the folder itself: it leaves no file behind and ends with its holder. Where there are
    no such locks (Windows, some network file systems) nothing is kept out, and a line says so.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        if hold:
            _lock(descriptor, folder)
        with guard_folder(folder):
            yield
    finally:
        if descriptor in _held:
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    import fcntl

    deadline_sec = time.monotonic() + _PATIENCE_SEC
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline_sec:
                raise UserError(
                    f"Another process is writing into '{folder}'", "Let it finish, or choose another --out"
                ) from None
            time.sleep(0.2)
        except OSError as error:  # nobody can be kept out, and that is no reason not to run
            say(
                f"'{folder}' lies on a file system without locks ({error.strerror}): see to it that no other process "
                "writes into it"
            )
            return


def _let_go() -> None:
    """Leave the folders to the parent: a lock ends with the last who has it, and workers outlive a killed parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)


AT_LEAST_1: tuple[str, Callable[[float], bool]] = ("at least 1", lambda value: value >= 1)
POSITIVE: tuple[str, Callable[[float], bool]] = ("positive", lambda value: value > 0)
NOT_NEGATIVE: tuple[str, Callable[[float], bool]] = ("0 or more", lambda value: value >= 0)
BELOW_1: tuple[str, Callable[[float], bool]] = ("0 or more and less than 1", lambda value: 0 <= value < 1)


def check_ranges(config: Any, rules: Sequence[tuple[tuple[str, Callable[[float], bool]], tuple[str, ...]]]) -> None:
    """Refuse values that make no sense; None passes. No field takes a number that is not finite, or beyond 64 bits."""
    values = flat(config)
    for (rule, is_kept), names in rules:
        for name in names:
            value = values.get(name)
            if value is not None and not is_kept(value):
                raise UserError(f"--{name.replace('_', '-')} is {value}", f"It must be {rule}")
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not (math.isfinite(value) and abs(value) < 2**63)
        if is_number:
            raise UserError(f"--{name.replace('_', '-')} is {value}"[:100], "It must be finite and less than 2^63")


def check_same_run(saved: Mapping[str, object], config: Any, free_to_change: Collection[str]) -> None:
    """Refuse to resume a run under another configuration."""
    now = flat(config)
    for field in flat_fields(type(config)):
        then = saved.get(field.name, to_plain(field.default))  # a run may be older than the field
        if field.name in now and field.name not in free_to_change and then != now[field.name]:
            raise UserError(
                f"'{config.out}' holds a run with --{field.name.replace('_', '-')} {then}, not {now[field.name]}",
                "Give the same flags to resume it, or another --out",
            )


@dataclass(frozen=True, kw_only=True)
class FlatField:
    """One field of a configuration, however deep it lies."""

    name: str

    annotation: Any
    """Its type, with what `Annotated` adds."""

    default: Any
    """`dataclasses.MISSING` where a value has to be given."""


def flat_fields(config_type: Any) -> tuple[FlatField, ...]:
    """List a configuration's fields, nested ones in their place."""
    found: list[FlatField] = []
    annotations = get_type_hints(config_type, include_extras=True)
    for field in fields(config_type):
        annotation = annotations[field.name]
        kind = _nested_type(annotation) or annotation
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if not is_dataclass(kind):
            found.append(FlatField(name=field.name, annotation=annotation, default=default))
            continue
        for nested in flat_fields(kind):
            own = nested.default if default is MISSING else flat_value(default, nested.name)
            found.append(replace(nested, default=own))
    return tuple(found)


def _nested_type(annotation: Any) -> Any:
    """Find the configuration that a field holds, also where it may be None; None where it holds none."""
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return next((each for each in (kind, *get_args(kind)) if is_dataclass(each)), None)


def flat_value(config: Any, name: str) -> Any:
    """Look up a field of a configuration, however deep it lies."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == name:
            return value
        if is_dataclass(value) and name in flat(value):
            return flat_value(value, name)
    raise AttributeError(f"{type(config).__name__} has no field '{name}'")


def flat(config: Any) -> dict[str, Any]:
    """Write a configuration, nested ones among its own fields, as plain JSON values; one that is None leaves none."""
    found: dict[str, Any] = {}
    annotations = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found |= flat(value)
        elif _nested_type(annotations[field.name]) is None:
            found[field.name] = to_plain(value)
    return found


def from_flat(config_type: type[Config], **values: Any) -> Config:
    """Build a configuration from flat fields; nested configurations need defaults."""
    own = {field.name for field in fields(config_type)}  # type: ignore[arg-type]
    config = config_type(**{name: value for name, value in values.items() if name in own})
    return change_flat(config, **{name: value for name, value in values.items() if name not in own})


def change_flat(config: Config, **values: Any) -> Config:
    """Replace fields of a configuration, however deep they lie."""
    changes: dict[str, Any] = {}
    known: set[str] = set()
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        names = set(flat(value)) if is_dataclass(value) else {field.name}
        given = {name: values[name] for name in names & values.keys()}
        known |= names
        if given:
            changes[field.name] = change_flat(value, **given) if is_dataclass(value) else given[field.name]
    if unknown := values.keys() - known:
        raise TypeError(f"{type(config).__name__} has no field '{min(unknown)}'")
    return replace(config, **changes)  # type: ignore[type-var]
