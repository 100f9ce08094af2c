"""What `eqvae sample` refuses before it looks at a generator."""

from pathlib import Path

import pytest

from eqvae.errors import UserError
from eqvae.runs.sample import SampleConfig


def configure(**options) -> SampleConfig:
    return SampleConfig(run="run", out=Path("out"), **options)


def test_the_published_protocol_is_the_default():
    config = configure()
    config.check()
    assert (config.num_samples, config.num_steps, config.classes, config.guidance_scale) == (
        50_000,
        None,
        "balanced",
        1,
    )


@pytest.mark.parametrize("classes", ["balanced", "random", "3", "3,7, 9"])
def test_classes(classes: str):
    configure(classes=classes).check()


def test_listed_classes():
    assert configure(classes="3,7, 9").listed_classes() == [3, 7, 9]


@pytest.mark.parametrize(
    ("classes", "numbers"),
    [("owl", [2]), ("owl,cat, owl", [2, 0, 2]), ("1,owl", [1, 2]), ("tench, Tinca tinca,cat", [3, 0])],
)
def test_classes_by_name(classes: str, numbers: list[int]):
    assert configure(classes=classes).listed_classes(("cat", "dog", "owl", "tench, Tinca tinca")) == numbers


def test_names_that_are_numbers_are_names():
    names = ("1", "5", "99")
    assert configure(classes="99,5").listed_classes(names) == [2, 1]
    with pytest.raises(UserError, match=r"Class 0 is not one of the generator's\. Use .* names such as 1, 5, 99"):
        configure(classes="0").listed_classes(names)


@pytest.mark.parametrize(
    ("classes", "what"),
    [("cats", r"Class cats is not one of the generator's\. Did you mean 'cat'\?"), ("cat,", "Class is not one"),
     ("-", "Class - is not one"), ("zebra", r"names such as cat, dog$")],
)  # fmt: skip
def test_classes_that_are_none(classes: str, what: str):
    with pytest.raises(UserError, match=what):
        configure(classes=classes).listed_classes(("cat", "dog"))
    with pytest.raises(UserError, match=f"--classes '{classes}' is not known"):
        configure(classes=classes).listed_classes()


@pytest.mark.parametrize(
    ("options", "what"),
    [({"classes": ""}, "--classes ''"), ({"classes": " , "}, "--classes ' , '"),
     ({"num_samples": 0}, "--num-samples is 0"), ({"guidance_scale": float("nan")}, "--guidance-scale is nan"),
     ({"guidance_low": 0.8, "guidance_high": 0.2}, "are no interval"), ({"guidance_high": 1.5}, "are no interval"),
     ({"temperature": 0.0}, "--temperature is 0"), ({"top_k": 0}, "--top-k is 0"),
     ({"choice_temperature": -1.0}, "--choice-temperature is -1"),
     ({"rtol": 0.0}, "--rtol is 0.0. It must be positive"),
     ({"guidance_channels": 0}, "--guidance-channels is 0"), ({"seed": -1}, "--seed is -1")],
)  # fmt: skip
def test_refused_values(options: dict, what: str):
    with pytest.raises(UserError, match=what):
        configure(**options).check()
