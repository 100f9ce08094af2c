"""Ranges of fields, and what a resumed run may change."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from eqvae.artifacts import to_plain
from eqvae.errors import UserError
from eqvae.runtime.run_folder import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_ranges, check_same_run


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
