"""What all configurations share: ranges of their fields, and what a resumed run may change."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from eqvae.artifacts import to_plain
from eqvae.errors import UserError

AT_LEAST_1: tuple[str, Callable[[float], bool]] = ("at least 1", lambda value: value >= 1)
POSITIVE: tuple[str, Callable[[float], bool]] = ("positive", lambda value: value > 0)
NOT_NEGATIVE: tuple[str, Callable[[float], bool]] = ("0 or more", lambda value: value >= 0)
BELOW_1: tuple[str, Callable[[float], bool]] = ("0 or more and less than 1", lambda value: 0 <= value < 1)


def check_ranges(config: Any, rules: Sequence[tuple[tuple[str, Callable[[float], bool]], tuple[str, ...]]]) -> None:
    """Refuse values that make no sense; None passes."""
    for (rule, is_kept), names in rules:
        for name in names:
            value = getattr(config, name)
            if value is not None and not is_kept(value):
                raise UserError(f"--{name.replace('_', '-')} is {value}", f"It must be {rule}")


def check_same_run(saved: Mapping[str, object], config: Any, free_to_change: Collection[str]) -> None:
    """Refuse to resume a run under another configuration."""
    for field in fields(config):
        now = to_plain(getattr(config, field.name))
        then = saved.get(field.name, to_plain(field.default))  # a run may be older than the field
        if field.name not in free_to_change and then != now:
            flag = field.name.replace("_", "-")
            raise UserError(
                f"'{config.out}' holds a run with --{flag} {then}, not {now}",
                "Give the same flags to resume it, or another --out",
            )
