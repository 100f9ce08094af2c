"""Pickles of tensors, read without running anything in them, and the tensors in whatever containers they lie in."""

import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqvae.artifacts.parsing import DAMAGE
from eqvae.errors import UserError

# fmt: off
_CODE = frozenset((
    "builtins", "bdb", "code", "commands", "copyreg", "ctypes", "ftplib", "http", "importlib", "io", "marshal",
    "multiprocessing", "nt", "operator", "os", "pdb", "pickle", "pip", "posix", "profile", "pty", "runpy", "shutil",
    "smtplib", "socket", "subprocess", "sys", "tempfile", "timeit", "urllib", "webbrowser",
))
# fmt: on
"""Modules that no weights need. Names of all others stand in as objects that do nothing, so that this list decides
what is told, not what is run: nothing is."""

_PLAIN = frozenset(
    ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str", "tuple")
)
"""Python's own types, which torch names without their module."""

_DICTIONARIES = re.compile(
    r"(defaultdict|EasyDict|ConfigDict|AttrDict|DictConfig|AttributeDict|Munch|Box|Dict|builtins.dict)$"
)

_REFUSED = re.compile(r"(GLOBAL|function) ([\w.]*\w)")
"""What torch's restricted unpickler names when a pickle asks for more than tensors and containers."""

_MAX_NESTING, _MAX_STEPS = 200, 600_000
_OLD_PICKLES = 5
"""In a file from before torch wrote archives: a number, a version, the machine, the content, the storages' names."""

_MAX_DEPTH, _MAX_ENTRIES, _MAX_STANDINS = 32, 2_000_000, 500

_FETCH = "Fetch or write it again"


class _Inert:
    """Stands for whatever lies beside weights, such as argparse's Namespace or a NumPy scalar; it does nothing."""

    def __new__(cls, *args: object, **others: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **others: object) -> None:
        """Take whatever arguments there are."""

    def __setstate__(self, state: object) -> None:
        """Take whatever state there is."""


class _InertList(list):
    """Stands for a list of some other class."""


class _InertDict:
    """Stands for a dictionary of some other class; torch's unpickler fills ordered ones."""

    def __new__(cls, *args: object, **others: object) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file that `torch.save` wrote, by dotted names."""
    content = _unpickle(path)
    tensors = _flatten(content, path)
    if not tensors:
        what = "" if isinstance(content, Mapping) else f" but {type(content).__name__}"
        raise UserError(f"'{path}' holds no named weights{what}", "Give a state dict or a training checkpoint")
    return tensors


def read_pickled_text(path: Path, key: str) -> str | None:
    """Read a text that lies at the top of a file that `torch.save` wrote; None where there is none."""
    content = _unpickle(path)
    text = content.get(key) if isinstance(content, Mapping) else None
    return text if isinstance(text, str) else None


def _unpickle(path: Path) -> Any:
    """Read a pickle by torch's restricted unpickler; objects of unknown classes are replaced by inert ones."""
    standins: dict[str, Any] = {}
    is_zip = _check_zip(path)
    try:
        _check_pickles(path, is_zip=is_zip)
    except _TooDeepError:
        raise _unreadable(path) from None
    except DAMAGE:
        pass  # torch stops where this did, and says why
    while len(standins) < _MAX_STANDINS:
        allowed: list[Any] = [(standin, name) for name, standin in standins.items()]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
        except pickle.UnpicklingError as error:
            name = _name_refused(str(error), path)
            if name in standins:
                break
            standins[name] = _make_standin(name)
        except DAMAGE:
            break
    raise _unreadable(path)


class _TooDeepError(Exception):
    """A pickle that nests deeper, or goes on for longer, than any of weights."""


def _check_nesting(file: Any) -> None:
    """Refuse tuples in tuples by the hundred: as a dictionary's key, they would crash the interpreter."""
    depths: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "MARK":
            marks.append(len(depths))
        elif "PUT" in opcode.name:
            memo[argument] = depths[-1]
        elif "GET" in opcode.name:
            depths.append(memo[argument])
        else:
            before = opcode.stack_before
            is_marked = pickletools.markobject in before
            taken = len(depths) - marks.pop() + before.index(pickletools.markobject) if is_marked else len(before)
            first = len(depths) - taken
            depth = max(depths[first:], default=0) + opcode.name.startswith(("TUPLE", "REDUCE", "NEWOBJ"))
            depths[first:] = [depth] * len(opcode.stack_after)
            if depth > _MAX_NESTING or count > _MAX_STEPS:
                raise _TooDeepError


def _check_pickles(path: Path, *, is_zip: bool) -> None:
    """Look through the pickles of a file before any is read."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as file:
                        _check_nesting(file)
        return
    with path.open("rb") as file:
        for _ in range(_OLD_PICKLES):
            _check_nesting(file)


def _name_refused(refusal: str, path: Path) -> str:
    """Name the unknown class that a pickle asks for; where it asks for code, it is refused."""
    found = _REFUSED.search(refusal)
    if found is None:
        raise _unreadable(path)
    name = f"builtins.{found[2]}" if found[2] in _PLAIN else found[2]
    if found[2] in _PLAIN:
        return name
    if "not an allowed global" not in refusal or "." not in name or name.partition(".")[0] in _CODE:
        raise UserError(
            f"'{path}' holds code ({found[0]}) and was refused: nothing in it was run",
            "Use a .safetensors file of the same weights",
        )
    return name


def _make_standin(name: str) -> type:
    if _DICTIONARIES.search(name):
        return _InertDict
    # A class of its own for each name: one may be a key beside another.
    return type(_Inert.__name__, (_InertList if name.endswith("ListConfig") else _Inert,), {})


def _unreadable(path: Path) -> UserError:
    return UserError(f"'{path}' is truncated or no weight file", _FETCH)


def _check_zip(path: Path) -> bool:
    """Refuse an archive that unpacks to more than it is long; says whether it is one."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(info.file_size for info in archive.infolist())
    except DAMAGE:
        raise _unreadable(path) from None
    if num_bytes > path.stat().st_size:
        raise UserError(f"'{path}' is packed or damaged: it claims to hold {num_bytes} bytes", "Save it by torch.save")
    return True


def _flatten(content: Any, path: Path) -> dict[str, Tensor]:
    """Give each tensor in nested containers a dotted name; containers that hold themselves are entered once."""
    found: dict[str, Tensor] = {}
    entered: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    for _ in range(_MAX_ENTRIES):
        if not waiting:
            return found
        name, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            if name:
                found[name] = value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in entered and depth < _MAX_DEPTH:
            entered.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in reversed([*items]):
                if isinstance(key, bytes):
                    key = key.decode("utf-8", "replace")
                if isinstance(key, str | int):
                    waiting.append((f"{name}.{key}" if name else str(key), item, depth + 1))
    raise UserError(f"'{path}' holds more than {_MAX_ENTRIES} entries", _FETCH)
