"""`eqvae COMMAND ...`: from arguments to a configuration, from a configuration to its run, from errors to exit codes.

`eqvae.runs.NAME` holds `NameConfig` and `command`, which does the run and returns the lines to print.
"""

import contextlib
import importlib
import io
import os
import re
import signal
import sys
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eqvae.errors import Interrupted, ProcessLost, UserError, nearest_name, printable
from eqvae.runtime.company import is_to_speak, leave_company
from eqvae.runtime.signals import StopRequest, terminated_by_signal

if TYPE_CHECKING:
    from types import ModuleType

COMMANDS = {
    "demo": "the whole story on built-in photographs, minutes on two CPU cores",
    "finetune": "fine-tune an autoencoder with EQ-VAE",
    "evaluate": "measure an autoencoder: equivariance, reconstruction, latents",
    "encode": "write an autoencoder's latents of images into a cache for generators",
    "train": "train a generator on a latent cache: DiT, SiT, SiT + REPA, GAT, MaskGIT",
    "adapt": "move a trained generator to the latents of another autoencoder",
    "sample": "draw images from a trained generator",
    "score": "score samples against a reference: FID, sFID, KID, Inception Score, precision, recall",
    "compare": "how much faster a generator learns: curves, time-to-quality speed-up, intervals",
    "rank": "order autoencoders by how well the same small generator learns their latents",
    "reproduce": "tables and figures of the paper: plan, run or resume, write them",
    "explore": "a local page to look into latents: sliders for tau, autoencoders side by side",
    "report": "one HTML page from the folders that the other commands wrote",
    "push": "publish a trained autoencoder or generator on the Hugging Face hub, with its card",
    "convert": "from one published layout to another: autoencoders and generators",
}

USAGE = """usage: eqvae COMMAND [...]

EQ-VAE: equivariance-regularized latent spaces for image generation (arXiv:2502.09509).

{commands}

'eqvae COMMAND --help' lists a command's flags."""

Config = TypeVar("Config")

_SAVE_MEMORY = ("batch_size", "tile", "num_workers")
"""Fields that lower what memory a command takes, where it has them."""

_MAX_CONFIG_BYTES = 2**16

_YAML_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))
_YAML_WORDS = {"": "None", "~": "None", "null": "None"}
_YAML_WORDS |= dict.fromkeys(("true", "yes", "on"), "True") | dict.fromkeys(("false", "no", "off"), "False")
"""What unquoted words mean in YAML 1.1."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 130 interrupted and resumable."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal can't show ends no finished command
    code = run(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done: the rest of the process has nothing to stop
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command, given what follows `eqvae` on the command line; returns the exit code."""
    code = 1
    try:
        code = _run(arguments)
    finally:
        leave_company(is_done=code == 0)
    return code


def _run(arguments: Sequence[str]) -> int:
    asked = StopRequest()
    try:
        with terminated_by_signal() as asked:
            return _dispatch(list(arguments))
    except Interrupted as stop:
        # Processes that stop together say it once.
        if is_to_speak() if isinstance(stop, ProcessLost) else _is_first():
            _complain(f"interrupted, {stop}")
        return 130
    except Exception as error:
        if asked:  # compiled code may turn the interruption into an error of its own, as safetensors' reader does
            _complain(f"interrupted, {asked.signal_name}; the same command goes on")
            return 130
        return _explain(error, arguments)


def _explain(error: Exception, arguments: Sequence[str]) -> int:
    """Say in one line what the user can mend, and raise what is our fault; returns the exit code."""
    if isinstance(error, UserError):
        _complain(str(error))
        return 2
    if reason := _why_full(error):
        fields = flag_types(_config_type(arguments[0]))
        flags = [_flag(name) for name in _SAVE_MEMORY if name in fields]
        _complain(str(UserError(reason, f"These help: {', '.join(flags)}" if flags else "Free some of it")))
        return 2
    if isinstance(error, OSError):
        where = f": '{error.filename}'" if error.filename else ""
        mend = "Check the path, its permissions and the space left" if error.errno else ""
        _complain(str(UserError(f"{error.strerror or error}{where}", mend)))
        return 2
    if isinstance(error, RuntimeError) and _is_lost_process(error):
        if is_to_speak():
            _complain("interrupted, another process ended; the same command goes on")
        return 130
    raise error


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _why_full(error: Exception) -> str:
    from eqvae.runtime.memory import why_full  # no `--help` waits for it

    return why_full(error)


def _is_lost_process(error: RuntimeError) -> bool:
    from eqvae.runtime.processes import is_lost_process

    return is_lost_process(error)


def _complain(line: str) -> None:
    print(f"eqvae: {line}", file=sys.stderr)  # noqa: T201


def _dispatch(arguments: list[str]) -> int:
    width = max(map(len, COMMANDS))
    usage = USAGE.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage)  # noqa: T201
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from eqvae import __version__

        print(f"eqvae {__version__}")  # noqa: T201
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"eqvae has no command '{command}'", nearest_name(command, COMMANDS))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of the libraries; what a user should know is said by our own lines
    config = parse(_config_type(command), command, rest)
    said = _module(command).command(config)
    if said is not None:
        print("\n".join(map(printable, said.split("\n"))))  # noqa: T201
    return 0


def _module(command: str) -> "ModuleType":
    return importlib.import_module(f"eqvae.runs.{command}")


def _config_type(command: str) -> Any:
    return getattr(_module(command), f"{command.title()}Config")


def parse(config_type: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """Turn a command's arguments into its configuration; every mistake is one line.

    `--config FILE.yaml` is read first, flags override it. A boolean flag may stand alone: `--flip` is `--flip True`,
    and `--no-flip` is `--flip False`.
    """
    import tyro

    fields = flag_types(config_type)
    file = next((f" and '{rest}'" for flag, rest in pairwise([*arguments, ""]) if flag == "--config"), "")
    arguments = _with_config_file(fields, command, _spell_out_booleans(fields, arguments))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                config_type, prog=f"eqvae {command}", args=arguments, return_unknown_args=True,
                config=(tyro.conf.FlagConversionOff,),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        missing = _missing(config_type, arguments)
        what = f"eqvae {command} needs {' and '.join(missing)}" if missing else _one_line(said.getvalue())
        raise UserError(what, f"See 'eqvae {command} --help'{file}") from None
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"eqvae {command} does not know '{unknown[0]}'", nearest_name(flag, map(_flag, fields)))
    return _expand_paths(config)


def _expand_paths(value: Any) -> Any:
    """Put homes in the places of the leading `~` of all paths: no shell does in `--out=~/run`, or in a YAML file."""
    from eqvae.artifacts.files import expanded

    if isinstance(value, Path):
        return expanded(value)
    if isinstance(value, tuple):
        return tuple(map(_expand_paths, value))
    if not is_dataclass(value) or isinstance(value, type):
        return value
    now = {field.name: getattr(value, field.name) for field in dataclass_fields(value)}
    changed = {name: new for name, old in now.items() if (new := _expand_paths(old)) != old}
    return replace(value, **changed) if changed else value


def _missing(config_type: Any, arguments: Sequence[str]) -> list[str]:
    """List what has to be given and is not."""
    from dataclasses import MISSING

    from eqvae.runtime.run_folder import flat_fields

    given = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    missing: list[str] = []
    for field in flat_fields(config_type):
        if field.default is MISSING and _is_positional(field.annotation):
            missing += [] if _has_positional(list(arguments)) else [field.name.upper()]
        elif field.default is MISSING and _flag(field.name) not in given:
            missing.append(_flag(field.name))
    return missing


def flag_types(config_type: Any) -> dict[str, Any]:
    """Map the names of all fields to their types; the fields of a nested configuration stand for themselves."""
    from eqvae.runtime.run_folder import flat_fields

    return {field.name: field.annotation for field in flat_fields(config_type)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _spell_out_booleans(fields: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """Give each boolean flag its value, so that from here on every flag has exactly one."""
    flags = {_flag(name) for name, kind in fields.items() if kind in (bool, bool | None)}
    spelled: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        flag = argument.replace("_", "-")
        if flag in flags:
            has_value = bool(rest) and rest[0].lower() in ("true", "false", "none")
            spelled += [flag, rest.popleft().capitalize() if has_value else "True"]
        elif flag.startswith("--no-") and (opposite := "--" + flag.removeprefix("--no-")) in flags:
            spelled += [opposite, "False"]
        else:
            spelled.append(argument)
    return spelled


def _with_config_file(fields: dict[str, Any], command: str, arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the flags that the file stands for, put first so that others override them."""
    for index, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.startswith("--config=")
            if not inline and index + 1 == len(arguments):
                raise UserError("--config needs a file", "Give a YAML file")
            name = argument.split("=", 1)[1] if inline else arguments[index + 1]
            rest = arguments[:index] + arguments[index + (1 if inline else 2) :]
            return _merge(fields, command, _expand_paths(Path(name)), rest)
    return arguments


def _is_positional(annotation: Any) -> bool:
    import tyro

    return tyro.conf.Positional in getattr(annotation, "__metadata__", ())


def _merge(fields: dict[str, Any], command: str, path: Path, rest: list[str]) -> list[str]:
    flags: list[str] = []
    positional: list[str] = []
    for key, value in _read_yaml(path).items():
        name = key.replace("-", "_")
        if name not in fields:
            raise UserError(
                f"'{path}' has a key '{key}' that eqvae {command} does not know", nearest_name(name, fields)
            )
        if _is_positional(fields[name]):
            positional = [] if _has_positional(rest) else [value]
        else:
            flags += [_flag(name), value]
    return positional + flags + rest


def _read_yaml(path: Path) -> dict[str, str]:
    """Read the text of 'name: value' lines: nothing is constructed, so tags, dates and aliases mean nothing."""
    import yaml

    mend = "Write it as 'name: value' lines"
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise UserError(f"--config '{path}' has more than {_MAX_CONFIG_BYTES} bytes", mend)
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--config '{path}' can't be read ({error.strerror})", "Check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config '{path}' is no YAML ({str(error)[:200]})", mend) from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config '{path}' holds no 'name: value' lines", "Write one line for each field")
    found: dict[str, str] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in found:
            line = key.start_mark.line + 1
            raise UserError(f"--config '{path}' has a name that is no word, or comes twice, in line {line}", mend)
        if not isinstance(value, yaml.ScalarNode) or value.tag not in _YAML_TAGS:
            kind = "a list" if isinstance(value, yaml.SequenceNode) else f"what is no plain value ({value.tag})"
            raise UserError(f"--config '{path}': '{key.value}' is {kind[:80]}", "Write what its flag takes")
        is_plain = value.style is None
        found[key.value] = _YAML_WORDS.get(value.value.lower(), value.value) if is_plain else value.value
    return found


def _has_positional(arguments: list[str]) -> bool:
    """Whether an argument is neither a flag nor a flag's value; every flag has one value."""
    belongs_to_flag = False
    for argument in arguments:
        if not belongs_to_flag and not argument.startswith("-"):
            return True
        belongs_to_flag = not belongs_to_flag and "=" not in argument
    return False


def _one_line(box: str) -> str:
    """Take the sentences out of the box that the command line library draws around its errors."""
    lines = [re.sub(r"[\u2500-\u257f]", " ", line).strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.split(r"Argument helptext:|For full helptext|To see full helptext", text)[0]
    return text.strip(" .:") or "the arguments can't be parsed"
