"""A YAML file stands for flags, whatever the command calls its positional argument."""

from pathlib import Path

import pytest

from eqvae.cli import parse, run
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.report import ReportConfig
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


def test_a_leading_tilde_is_the_home_in_every_path(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("latents: ~/latents\n")
    config = parse(TrainConfig, "train", ["dit-s-2", "--config=~/config.yaml", "--out=~/run"])
    assert (config.latents, config.out) == (tmp_path / "latents", tmp_path / "run")
    assert parse(SampleConfig, "sample", ["run", "--out=o", "--weak-run=~/weak"]).weak_run == tmp_path / "weak"
    assert parse(ReportConfig, "report", ["~/a", "b", "--out=o"]).folders == (tmp_path / "a", Path("b"))


def test_memory_that_does_not_suffice_is_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    def fill(config: object) -> None:
        raise MemoryError

    for command, words, flags in (
        ("evaluate", ["tiny-kl", "--data", "photos"], "These help: --batch-size, --tile, --num-workers"),
        ("report", ["a"], "Free some of it"),
    ):
        monkeypatch.setattr(f"eqvae.runs.{command}.command", fill)
        assert run([command, *words, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"eqvae: the machine's memory is full. {flags}\n"
