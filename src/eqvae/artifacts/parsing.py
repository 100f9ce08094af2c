"""JSON whose numbers are all finite, and what readers of others' bytes raise."""

import json
import lzma
import math
import pickle
import struct
import tokenize
import zipfile
import zlib
from typing import Any

from safetensors import SafetensorError

DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError,
    RuntimeError, SafetensorError, SyntaxError, TypeError, ValueError, lzma.LZMAError, pickle.UnpicklingError,
    struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What readers of others' bytes raise where these are damaged. (NumPy's and zipfile's have no errors of their own.)"""

_MAX_DIGITS = 20


def parse_json(text: str) -> Any:
    """Parse JSON; NaN, infinite numbers and any that float64 does not hold are a ValueError."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no finite number")

    def read_float(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse(text)

    def read_int(text: str) -> int:
        return int(text) if len(text) <= _MAX_DIGITS else int(refuse(f"{text[:_MAX_DIGITS]}..."))

    return json.loads(text, parse_constant=refuse, parse_float=read_float, parse_int=read_int)


def find_not_finite(value: Any, where: str = "") -> str | None:
    """Name the first entry of plain values that is NaN or infinite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (find_not_finite(item, f"{where}.{name}" if where else str(name)) for name, item in items)
    return next((each for each in found if each is not None), None)


def without_not_finite(value: Any) -> Any:
    """Replace NaN and infinite numbers among plain values by null, which JSON knows: a journal tells of bad steps."""
    if isinstance(value, dict):
        return {name: without_not_finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_not_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
