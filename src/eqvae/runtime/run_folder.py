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
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from eqvae.artifacts.files import check_writable, read_json, to_plain, write_json
from eqvae.artifacts.names import CONFIG, METRICS
from eqvae.errors import UserError
from eqvae.runtime.journal import write_environment
from eqvae.runtime.processes import Processes, notice_lost_process

Config = TypeVar("Config")

_PATIENCE_SEC = 15.0
"""A killed process's workers hold its folder until they notice, which takes them some seconds."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder that a command writes into."""

    path: Path

    command: str

    saved: Mapping[str, Any] | None
    """`config.json` of an earlier session; None in a new folder."""

    @classmethod
    def claim(cls, path: Path, command: str) -> "RunFolder":
        """Find a new folder, an empty one, or one of the same command, and refuse any other."""
        saved = None
        if (path / CONFIG).is_file():
            saved = read_json(path / CONFIG)
            if saved.get("command") != command:
                owner = f"belongs to 'eqvae {saved['command']}'" if "command" in saved else "holds something else"
                raise UserError(f"--out '{path}' {owner}", "Choose another folder")
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--out '{path}' exists and holds no 'eqvae {command}' run", "Choose another folder")
        check_writable(path, "--out")
        return cls(path=path, command=command, saved=saved)

    def check_same(self, config: Any, free_to_change: Collection[str]) -> None:
        """Refuse to resume a run under another configuration."""
        if self.saved is not None:
            check_same_run(self.saved, config, free_to_change)

    def differs(self, **identity: object) -> bool:
        """Whether an earlier session began from something else, a fingerprint say."""
        return self.saved is not None and any(self.saved.get(name) != value for name, value in identity.items())

    @property
    def figures(self) -> dict[str, Any] | None:
        """`metrics.json` of a run that has finished."""
        if self.saved is None or not (self.path / METRICS).exists():
            return None
        return read_json(self.path / METRICS)

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
        with hold_output_folder(self.path, hold=processes.is_first):
            if processes.is_first:
                for name in anew:
                    (self.path / name).unlink(missing_ok=True)
                write_json(self.path / CONFIG, flat(config) | {"command": self.command} | identity)
                write_environment(self.path, device=processes.device, seed=seed, num_processes=processes.count)
            processes.wait()
            with notice_lost_process(f"the same command goes on from what is in '{self.path}'"):
                yield


@contextlib.contextmanager
def hold_output_folder(folder: Path, *, hold: bool = True) -> Iterator[None]:
    """Keep a second process from writing into a folder while this one does.

    The lock is the system's, on the folder itself: it leaves no file behind and ends with its holder. Where there are
    no such locks (Windows, some network file systems) nothing is kept out.
    """
    if not hold or sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    deadline_sec, is_taken = time.monotonic() + _PATIENCE_SEC, True
    try:
        while is_taken:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_taken = False
            except BlockingIOError:
                if time.monotonic() > deadline_sec:
                    raise UserError(
                        f"Another process is writing into '{folder}'", "Let it finish, or choose another --out"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks: nobody can be kept out, and that is no reason not to run
                is_taken = False
        yield
    finally:
        os.close(descriptor)


AT_LEAST_1: tuple[str, Callable[[float], bool]] = ("at least 1", lambda value: value >= 1)
POSITIVE: tuple[str, Callable[[float], bool]] = ("positive", lambda value: value > 0)
NOT_NEGATIVE: tuple[str, Callable[[float], bool]] = ("0 or more", lambda value: value >= 0)
BELOW_1: tuple[str, Callable[[float], bool]] = ("0 or more and less than 1", lambda value: 0 <= value < 1)


def check_ranges(config: Any, rules: Sequence[tuple[tuple[str, Callable[[float], bool]], tuple[str, ...]]]) -> None:
    """Refuse values that make no sense; None passes."""
    values = flat(config)
    for (rule, is_kept), names in rules:
        for name in names:
            value = values.get(name)
            if value is not None and not is_kept(value):
                raise UserError(f"--{name.replace('_', '-')} is {value}", f"It must be {rule}")


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
