"""The evaluation run: it never replaces or mixes with another one."""

from dataclasses import replace

import pytest

from eqvae.artifacts import read_json
from eqvae.errors import UserError
from eqvae.runs.evaluate import EvaluateConfig, evaluate


@pytest.fixture
def config(tmp_path, photographs):
    return EvaluateConfig(
        autoencoder="small", data=str(photographs), out=tmp_path / "out", image_size=64, num_images=2, lpips=False,
        num_workers=0, device="cpu",
    )  # fmt: skip


def test_the_same_evaluation_is_written_anew(config, small_autoencoder):
    evaluate(config, small_autoencoder)
    evaluate(replace(config, num_images=3), small_autoencoder)
    assert read_json(config.out / "metrics.json")["num_images"] == 3
    assert read_json(config.out / "config.json")["num_images"] == 3


def test_another_evaluation_is_not_replaced(config, small_autoencoder, averaging_autoencoder):
    evaluate(config, small_autoencoder)
    before = {path.name: path.read_bytes() for path in config.out.iterdir()}
    with pytest.raises(UserError, match="autoencoder 'small', not 'other'"):
        evaluate(replace(config, autoencoder="other"), small_autoencoder)
    with pytest.raises(UserError, match="not 'photos'"):
        evaluate(replace(config, data="photos"), small_autoencoder)
    with pytest.raises(UserError, match="'small' with other weights"):
        evaluate(config, averaging_autoencoder)
    assert {path.name: path.read_bytes() for path in config.out.iterdir()} == before


def test_a_kill_leaves_no_mixture(config, small_autoencoder, monkeypatch):
    evaluate(config, small_autoencoder)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eqvae.runs.evaluate.write_environment", die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(config, num_images=3), small_autoencoder)
    assert not (config.out / "metrics.json").exists()
