"""A YAML file stands for flags, whatever the command calls its positional argument."""

import pytest

from eqvae.cli import parse, run
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


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("finetune", "AUTOENCODER and --data and --out"),
        ("finetune tiny-kl --data photos", "--out"),
        ("evaluate --data photos --out=there", "AUTOENCODER"),
        ("sample --seed 3 runs/dit", "--out"),
    ],
)
def test_what_is_missing_is_named(words: str, missing: str, capsys: pytest.CaptureFixture[str]):
    command, *_ = words.split()
    assert run(words.split()) == 2
    assert capsys.readouterr().err == f"eqvae: eqvae {command} needs {missing}. See 'eqvae {command} --help'\n"
