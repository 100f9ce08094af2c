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
    ("options", "what"),
    [({"classes": "cats"}, "--classes 'cats' is not known"), ({"classes": ""}, "--classes ''"),
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
