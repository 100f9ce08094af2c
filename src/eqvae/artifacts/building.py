"""Models that a file describes, built only as far as any model goes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_MOST_MODULES = 3_000
"""In one model; the largest presets have some hundreds."""


@contextmanager
def bounded_building() -> Iterator[None]:
    """Stop the building of a model that has more parts than any, before time and memory are gone: a ValueError."""
    count = 0

    def register(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise ValueError(f"it has more than {_MOST_MODULES} parts")

    handle = nn.modules.module.register_module_module_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()
