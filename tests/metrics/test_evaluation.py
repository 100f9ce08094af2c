"""The evaluation run: it never replaces or mixes with another one."""

import subprocess
import sys
from dataclasses import replace

import pytest

from eqvae.artifacts.files import read_json
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

    monkeypatch.setattr("eqvae.runtime.run_folder.write_environment", die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(config, num_images=3), small_autoencoder)
    assert not (config.out / "metrics.json").exists()


@pytest.mark.slow
def test_no_figure_depends_on_the_number_of_processes(config, tmp_path):
    config = replace(
        config, autoencoder="untrained:tiny-kl", image_size=32, num_images=5, batch_size=2, num_pictures=4, all=True,
        features="efficientnet-lite0",
    )  # fmt: skip
    expected = evaluate(replace(config, out=tmp_path / "alone"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eqvae"]
    arguments = [
        "evaluate", config.autoencoder, "--data", config.data, "--out", config.out, "--features", config.features,
        "--image-size", 32, "--num-images", 5, "--batch-size", 2, "--num-pictures", 4, "--all", "--no-lpips",
        "--num-workers", 0, "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("psnr_db") == 1  # one process speaks
    figures = read_json(config.out / "metrics.json")
    assert figures.pop("images_per_sec") > 0.0
    assert figures == pytest.approx({name: expected[name] for name in figures}, rel=1e-6, abs=1e-6)
    assert list(expected) == [*figures, "images_per_sec"]
    assert read_json(config.out / "environment.json")["num_processes"] == 2
    assert (config.out / "pictures.safetensors").read_bytes() == (tmp_path / "alone/pictures.safetensors").read_bytes()
    curves, others = (read_json(folder / "spectrum.json") for folder in (config.out, tmp_path / "alone"))
    for name, curve in curves.items():
        assert curve == pytest.approx(others[name], rel=1e-9)
