"""From JSON to records, held to the types of their fields: a file that somebody edited fails by name, not later."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

_LARGEST_INTEGER = 2**63
_LARGEST_FLOAT = 1e30
"""No scale, mean or count that we write comes near; its square in float32 would be infinite."""


def to_record(kind: type[Record], content: object, *, where: str = "") -> Record:
    """Build a frozen record from what JSON held; what does not fit its annotations is a ValueError that names it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where or 'it'} is no object but {_short(content)}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for name in content:
        if name not in known:
            raise ValueError(f"{_join(where, name)} is not known")
    values = {}
    for name, field in known.items():
        if name in content:
            values[name] = to_type(hints[name], content[name], where=_join(where, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_join(where, name)} is missing")
    return kind(**values)


def to_type(kind: Any, value: object, *, where: str) -> Any:
    """Turn what JSON held into what an annotation asks for: numbers, words, tuples, dictionaries, records, unions."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _to_any(arguments, value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ValueError(f"{where} is {_short(value)}, none of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is no list but {_short(value)}")
        return tuple(to_type(arguments[0], item, where=f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is no object but {_short(value)}")
        return {str(name): to_type(arguments[1], item, where=_join(where, name)) for name, item in value.items()}
    if is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        return to_record(kind, value, where=where)  # type: ignore[arg-type]
    return _to_plain(kind, value, where)


def _to_any(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    """Take the first kind that fits; None is one of them or it is not."""
    if value is None and type(None) in kinds:
        return None
    faults = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return to_type(kind, value, where=where)
            except ValueError as error:
                faults.append(error)
    raise faults[0]


def _to_plain(kind: Any, value: object, where: str) -> Any:
    is_integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST_INTEGER
    if kind is Any:
        return value
    if kind is int and is_integer:
        return value
    if kind is float and (is_integer or (isinstance(value, float) and math.isfinite(value))):
        if abs(value) <= _LARGEST_FLOAT:  # type: ignore[arg-type]
            return float(value)  # type: ignore[arg-type]
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"{where} is {_short(value)}, no {getattr(kind, '__name__', kind)}")


def _join(where: str, name: object) -> str:
    return f"{where}.{name}"[:100] if where else str(name)[:100]


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, Mapping | list | tuple | int) else f"a {type(value).__name__}"
    text = repr(value) if isinstance(value, int) and abs(value) < _LARGEST_INTEGER else text
    return text[:60]
