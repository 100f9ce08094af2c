"""A YAML file stands for flags, whatever the command calls its positional argument."""

import pytest

from eqvae.cli import parse
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.sample import SampleConfig
from eqvae.runs.score import ScoreConfig
from eqvae.runs.train_config import TrainConfig


@pytest.mark.parametrize(
    ("config_type", "name", "rest"),
    [
        (ScoreConfig, "samples", {"reference": "b", "out": "c"}),
        (TrainConfig, "recipe", {"latents": "b", "out": "c"}),
        (SampleConfig, "run", {"out": "c"}),
        (EncodeConfig, "autoencoder", {"data": "b", "out": "c"}),
    ],
)
def test_the_positional_argument_may_stand_in_the_file(tmp_path, config_type, name, rest):
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in {name: "a", **rest}.items()))
    config = parse(config_type, "any", ["--config", str(path)])
    assert str(getattr(config, name)) == "a"
    assert str(config.out) == "c"
    assert str(getattr(parse(config_type, "any", ["z", "--config", str(path)]), name)) == "z"
