"""`eqvae score`: figures on standard output, and every mistake in one line."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from eqvae.artifacts.files import read_json
from eqvae.artifacts.sample_sets import write_sample_set
from eqvae.cli import run


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    write_sample_set(path, np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    return path


@pytest.fixture
def fails(capsys, tmp_path):
    """A function that scores into `--out`, which must fail in one line, and returns the line."""

    def check(*arguments: object) -> str:
        code = run(["score", *map(str, arguments), "--out", str(tmp_path / "out"), "--device", "cpu"])
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("eqvae: ")
        assert not (tmp_path / "out").exists()
        return line

    return check


def test_a_score(samples, tmp_path, capsys):
    flags = ["--features", "efficientnet-lite0", "--num-workers", "0", "--device", "cpu", "--out", tmp_path / "out"]
    assert run([str(each) for each in ("score", samples, "--reference", "photos", *flags)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = dict(line.split() for line in lines)
    figures = read_json(tmp_path / "out" / "metrics.json")
    assert float(shown["fd_efficientnet_lite0"]) == pytest.approx(figures["fd_efficientnet_lite0"], rel=1e-5)
    assert shown["num_samples"] == "5"
    assert shown["num_reference"] == "6"


def test_a_reference_is_named(fails, samples):
    assert "--reference" in fails(samples)
    fails(samples, "photos")  # a second positional argument is never taken for it
    fails("photos", samples, "--reference", "photos")


def test_inception_without_weights(fails, samples, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    line = fails(samples, "--reference", "photos")
    assert "weights-inception-2015-12-05-6726825d.pth" in line
    assert "--features efficientnet-lite0" in line


@pytest.mark.parametrize(
    "flag",
    ["--num-images", "--num-reference", "--batch-size", "--num-neighbours", "--split-size", "--kid-subsets",
     "--kid-subset-size", "--num-workers", "--seed"],
)  # fmt: skip
def test_a_value_out_of_range(fails, samples, flag):
    assert f"{flag} is -1" in fails(samples, "--reference", "photos", flag, -1)


def test_cheap_checks_come_before_the_features(fails, samples, tmp_path, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("eqvae.runs.score.load_features", never)
    assert "no/such.npz" in fails("no/such.npz", "--reference", "photos")
    assert "no/such/folder" in fails(samples, "--reference", "no/such/folder")
    assert "no.npz" in fails(samples, "--reference", "no.npz")
    assert "no.safetensors" in fails(samples, "--reference", "no.safetensors")
    assert "--num-images 6" in fails(samples, "--reference", "photos", "--num-images", 6)
    np.savez(tmp_path / "floats.npz", np.zeros((5, 16, 16, 3)))
    assert "float64" in fails(tmp_path / "floats.npz", "--reference", "photos")
    (tmp_path / "empty").mkdir()
    assert "no image" in fails(tmp_path / "empty", "--reference", "photos")


def test_unknown_features(fails, samples):
    assert "Did you mean 'inception'?" in fails(samples, "--reference", "photos", "--features", "incepton")
