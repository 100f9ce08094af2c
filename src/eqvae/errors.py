"""Errors that the user can mend.

Everything that is the input's fault is raised as `UserError`. The command line prints it as one line and exits with 2;
any other exception is our fault and keeps its traceback.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


class UserError(Exception):
    """Wrong input: one line that names what is wrong, where, and the mend."""

    def __init__(self, what: str, mend: str = "") -> None:
        """Join the two halves to one line."""
        self.what = " ".join(what.split())
        line = f"{what}. {mend}" if mend else what
        super().__init__(" ".join(line.split()))


class Interrupted(Exception):  # noqa: N818 - it is no error: the run can be resumed
    """A SIGTERM or SIGINT ended a run after its checkpoint was written; the command line exits with 130."""


class ProcessLost(Interrupted):
    """Another process of the run ended; what is left of it ends too, from where its last checkpoint can be resumed."""


class NotFiniteError(ArithmeticError):
    """A loss or a gradient became NaN, infinite or enormous; the state was left as it was before the step."""

    def __init__(
        self,
        what: str,
        began: str = "loss",
        terms: Mapping[str, float] = MappingProxyType({}),
        draws: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Keep which term began it, all terms, and what was drawn for the step."""
        self.began, self.terms, self.draws = began, dict(terms), list(draws)
        super().__init__(what)


def printable(name: str) -> str:
    """Write a name that may hold any bytes, with escapes for those that are no text or would act on a terminal.

    Names of files are bytes; Python keeps those that are no UTF-8 as lone surrogates, which nothing can print.
    """
    return "".join(char if char.isprintable() else _escape(char) for char in name)


def readable(text: str) -> str:
    """Write a text of any length, with escapes for bytes that are none and can't be written; all else stays."""
    return re.sub("[\ud800-\udfff]", lambda found: _escape(found[0]), text)


def _escape(char: str) -> str:
    byte = ord(char) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else char.encode("unicode_escape").decode()


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}"
