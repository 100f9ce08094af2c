"""Ranges of fields, and what a resumed run may change."""

from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path

import pytest

from eqvae.artifacts.files import to_plain
from eqvae.errors import UserError
from eqvae.runtime.run_folder import (
    AT_LEAST_1,
    BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    change_flat,
    check_ranges,
    check_same_run,
    flat,
    flat_fields,
    flat_value,
    from_flat,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    num_steps: int | None = 5
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    device: str = "cpu"


CONFIG = Config(out=Path("run"))


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [(AT_LEAST_1, (1.0, 7.0), (0.0, -1.0)), (POSITIVE, (1e-9,), (0.0, -1.0)), (NOT_NEGATIVE, (0.0,), (-1e-9,)),
     (BELOW_1, (0.0, 0.999), (1.0, -0.1))],
)  # fmt: skip
def test_ranges(rule, inside: tuple[float, ...], outside: tuple[float, ...]):
    for value in inside:
        check_ranges(replace(CONFIG, rate=value), [(rule, ("rate",))])
    for value in (*outside, float("nan")):
        with pytest.raises(UserError, match=f"--rate is {value}. It must be {rule[0]}"):
            check_ranges(replace(CONFIG, rate=value), [(rule, ("rate",))])


def test_none_passes_and_flags_have_dashes():
    check_ranges(replace(CONFIG, num_steps=None), [(AT_LEAST_1, ("num_steps",))])
    with pytest.raises(UserError, match="--num-steps is 0"):
        check_ranges(replace(CONFIG, num_steps=0), [(AT_LEAST_1, ("num_steps",))])


def test_the_same_run():
    saved = to_plain(CONFIG) | {"command": "train"}
    check_same_run(saved, replace(CONFIG, device="cuda"), {"device", "out"})
    with pytest.raises(UserError, match="'run' holds a run with --rate 0.5, not 0.25.*another --out"):
        check_same_run(saved, replace(CONFIG, rate=0.25), {"device"})
    with pytest.raises(UserError, match="--sizes"):
        check_same_run(saved, replace(CONFIG, sizes=(1,)), {"device"})


def test_a_run_older_than_a_field():
    saved = {name: value for name, value in to_plain(CONFIG).items() if name != "rate"}
    check_same_run(saved, CONFIG, set())
    with pytest.raises(UserError, match="with --rate 0.5, not 0.75"):
        check_same_run(saved, replace(CONFIG, rate=0.75), set())


# Nested configurations ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 2
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    out: Path
    inner: Inner = field(default_factory=lambda: Inner(width=5))
    rate: float = 0.5


def test_nested_fields_are_flat_outside():
    config = from_flat(Outer, out=Path("run"), paths=(Path("a"),))
    assert config == Outer(out=Path("run"), inner=Inner(width=5, paths=(Path("a"),)))
    assert flat(config) == {"out": "run", "width": 5, "paths": ["a"], "rate": 0.5}
    assert [(each.name, each.default) for each in flat_fields(Outer)] == [
        ("out", MISSING), ("width", 5), ("paths", ()), ("rate", 0.5),
    ]  # fmt: skip
    changed = change_flat(config, width=7, rate=0.25)
    assert (changed.inner.width, changed.rate, changed.out) == (7, 0.25, Path("run"))
    assert flat_value(changed, "width") == 7
    with pytest.raises(TypeError, match="Outer has no field 'wdith'"):
        change_flat(config, wdith=3)
    with pytest.raises(AttributeError, match="wdith"):
        flat_value(config, "wdith")


def test_nested_fields_are_checked_by_their_flags():
    config = Outer(out=Path("run"))
    with pytest.raises(UserError, match="--width is 5. It must be 0 or more and less than 1"):
        check_ranges(config, [(BELOW_1, ("width",))])
    check_same_run({"out": "run", "rate": 0.5, "paths": []}, config, set())  # older than `width`
    with pytest.raises(UserError, match="with --width 5, not 6"):
        check_same_run({"out": "run"}, change_flat(config, width=6), set())
