"""Turns the command line and an optional YAML file into a configuration; every mistake is one line."""

import contextlib
import io
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml

from eqvae.errors import UserError, nearest_name

Config = TypeVar("Config")


def parse(config_type: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """Parse a command's arguments; `--config FILE.yaml` is read first, flags override it.

    A boolean flag may stand alone: `--flip` is `--flip True`, and `--no-flip` is `--flip False`.
    """
    arguments = _with_config_file(config_type, command, _spell_out_booleans(config_type, arguments))
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
        raise UserError(_one_line(said.getvalue()), f"See 'eqvae {command} --help'") from None
    if unknown:
        flags = ["--" + field.name.replace("_", "-") for field in fields(config_type)]  # type: ignore[arg-type]
        raise UserError(f"eqvae {command} does not know '{unknown[0]}'", nearest_name(unknown[0].split("=")[0], flags))
    return config


def _spell_out_booleans(config_type: type, arguments: Sequence[str]) -> list[str]:
    """Give each boolean flag its value, so that from here on every flag has exactly one."""
    kinds = get_type_hints(config_type)
    flags = {"--" + name.replace("_", "-") for name, kind in kinds.items() if kind in (bool, bool | None)}
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


def _with_config_file(config_type: type, command: str, arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the flags that the file stands for, put first so that others override them."""
    for index, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.startswith("--config=")
            if not inline and index + 1 == len(arguments):
                raise UserError("--config needs a file", "Give a YAML file")
            name = argument.split("=", 1)[1] if inline else arguments[index + 1]
            rest = arguments[:index] + arguments[index + (1 if inline else 2) :]
            return _merge(config_type, command, _read_yaml(Path(name)), Path(name), rest)
    return arguments


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config '{path}' can't be read ({error.strerror})", "Check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config '{path}' is no YAML ({error})", "Write it as 'name: value' lines") from None
    if not isinstance(content, dict):
        raise UserError(f"--config '{path}' holds no 'name: value' lines", "Write one line for each field")
    return content


def _merge(config_type: type, command: str, content: dict[str, Any], path: Path, rest: list[str]) -> list[str]:
    known = {field.name for field in fields(config_type)}
    annotations = get_type_hints(config_type, include_extras=True)
    flags: list[str] = []
    positional: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"'{path}' has a key '{key}' that eqvae {command} does not know", nearest_name(name, known))
        if tyro.conf.Positional in getattr(annotations[name], "__metadata__", ()):
            positional = [] if _has_positional(rest) else [str(value)]
        else:
            flags += ["--" + name.replace("_", "-"), str(value)]
    return positional + flags + rest


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
