"""Methods by name: one list for the command line, `--help`, the README and the documentation."""

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, dataclass_transform, get_args, get_origin, get_type_hints

from eqvae.errors import UserError, nearest_name
from eqvae.methods.protocol import Method, Pair, Term
from eqvae.methods.transform_config import TransformConfig

Kind = TypeVar("Kind", bound=type[Method])

METHODS: dict[str, type[Method]] = {}
"""All methods of the package, in the order in which they are listed."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def method(name: str) -> Callable[[Kind], Kind]:
    """Make a class a method under a name: its annotated fields become parameters.

    Args:
        name: For `--method NAME`; lower case, with hyphens.

    Returns:
        The decorator of a `Pair` or a `Term`.
    """

    def register(kind: Kind) -> Kind:
        dataclass(frozen=True, kw_only=True)(kind)  # in place
        kind.name = name
        if kind.__module__.startswith("eqvae."):
            METHODS[name] = kind
        return kind

    return register


def find_method(name: str) -> type[Method]:
    """Look up a method: a registered name, or `FILE.py:CLASS` of one's own."""
    if ":" not in name:
        if name not in METHODS:
            raise UserError(f"--method has no '{name}'", nearest_name(name, METHODS))
        return METHODS[name]
    file, class_name = name.rsplit(":", 1)
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--method '{path}' is no file", "Check the path")
    found = vars(_import(path, path.read_bytes())).get(class_name)
    if not isinstance(found, type) or not issubclass(found, Pair | Term) or not hasattr(found, "name"):
        raise UserError(
            f"'{file}' has no method '{class_name}'", "Name a subclass of Pair or Term with @method above it"
        )
    if issubclass(found, Term) and not hasattr(found, "default_weight"):
        raise UserError(f"The term '{class_name}' of '{file}' has no weight", "Give its class a default_weight")
    found.name = name
    return found


@lru_cache
def _import(path: Path, content: bytes) -> object:
    """Run a Python file as a module of its own, once for each content."""
    del content
    name = f"eqvae_method_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look up their types
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # whatever the file raises is the file's fault
        raise UserError(f"'{path}' can't be imported ({type(error).__name__}: {error})", "Mend it") from None
    return module


def parameter_types(kind: type[Method]) -> dict[str, Any]:
    """A method's parameters and their types."""
    hints, listed = get_type_hints(kind), fields(cast(Any, kind))
    return {each.name: hints[each.name] for each in listed if each.init}


def read_value(annotation: Any, text: str) -> object:
    """Turn the text of a parameter into its value; a ValueError says what it should be."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for option in sorted(options, key=lambda option: option in (str, Path)):  # as which any text can be read
            with contextlib.suppress(ValueError):
                return read_value(option, text)
        raise ValueError(" or ".join(map(_called, options)))
    if origin in (tuple, list, Sequence):
        return _read_values(annotation, [part.strip() for part in text.strip("[]").split(",")])
    words: dict[Any, dict[str, object]] = {bool: {"true": True, "false": False}, type(None): {"none": None}}
    known = {str(option): option for option in options} if origin is Literal else words.get(annotation)
    if known is not None:
        if text not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return known[text]
    try:
        value = annotation(text)
    except ValueError:
        raise ValueError(_called(annotation)) from None
    except TypeError:
        raise UserError(f"no text is a {annotation}", "Use bool, int, float, str, Path, Literal, or tuples") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _read_values(annotation: Any, parts: Sequence[str]) -> object:
    """Read a list, a tuple of any length, or one whose values have each their own type."""
    origin, kinds = get_origin(annotation), get_args(annotation)
    if origin is not tuple or kinds[1:] == (...,):
        kinds = kinds[:1] * len(parts)
    if len(kinds) != len(parts):
        raise ValueError(f"{len(kinds)} values")
    values = [read_value(kind, part) for kind, part in zip(kinds, parts, strict=True)]
    return values if origin is list else tuple(values)


def _called(annotation: Any) -> str:
    return {int: "a whole number", float: "a number", type(None): "none"}.get(annotation, str(annotation))


def summary(kind: type[Method]) -> str:
    """The first paragraph of a method's description, in one line."""
    return " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())


def source(kind: type[Method]) -> str:
    """Where a method comes from: the first line of its file."""
    return (sys.modules[kind.__module__].__doc__ or "").split("\n")[0].rstrip(".")


def names_of(shape: type[Method]) -> str:
    """The registered pairs, or terms."""
    return ", ".join(name for name, kind in METHODS.items() if issubclass(kind, shape))


def table(*, is_whole: bool = True) -> str:
    """All methods as a Markdown table: the documentation's, or without values and sources the README's."""
    titles = ["`--method`", "shape", "what it does", *(["values", "source"] if is_whole else [])]
    rows = [titles, ["---"] * len(titles)]
    for name, kind in METHODS.items():
        default: Any = kind()
        values = str(default.resolved() if isinstance(default, TransformConfig) else default)
        shape = "pair" if issubclass(kind, Pair) else f"term, {cast(type[Term], kind).default_weight:g}"
        row = [
            f"`{name}`",
            shape,
            summary(kind),
            *([values.removeprefix(name).strip("()"), source(kind)] if is_whole else []),
        ]
        rows.append([cell.replace("|", "\\|") for cell in row])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
