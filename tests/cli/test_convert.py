"""`eqvae convert` on the command line: what it prints, and wrong input in one line."""

from pathlib import Path

import pytest

from eqvae.artifacts.files import read_json
from eqvae.autoencoders import load_autoencoder
from eqvae.cli import run


def test_it_says_where_and_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    assert run(["convert", "tiny-kl", str(folder), "--to", "diffusers"]) == 0
    path, keys, loading, shift, same = capsys.readouterr().out.splitlines()
    assert path == str(folder)
    assert keys == "  168 tensors, 2,086,215 numbers: 168 under the same names, 0 under other ones"
    assert loading == "  load it with diffusers.AutoencoderKL.from_pretrained"
    factor = read_json(folder / "config.json")["shift_factor"]
    assert shift.startswith(f"  shift_factor {factor:.6g}, 0.") and "--fold unit" in shift
    assert "StableDiffusion, DiT" in shift
    assert same == "  largest difference of outputs, loaded again: 0"
    assert load_autoencoder(str(folder)).fingerprint() == load_autoencoder("tiny-kl").fingerprint()


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["convert", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("eqvae: ")
    return line


def test_wrong_input_is_one_line(tmp_path: Path, saved_autoencoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    assert "8 groups instead of 32" in fails(capsys, saved_autoencoder, file, "--to", "ldm")
    assert "AutoencoderTiny" in fails(capsys, "taesd", file, "--to", "ldm")
    assert "Did you mean 'tiny-kl'?" in fails(capsys, "tiny-lk", file.with_suffix(""), "--to", "diffusers")
    assert f"'{tmp_path}' exists" in fails(capsys, "tiny-kl", tmp_path, "--to", "diffusers")
    assert "'diffusers', 'ldm'" in fails(capsys, "tiny-kl", file, "--to", "pickle")
    assert "DESTINATION" in fails(capsys, "tiny-kl", "--to", "ldm")
    assert "--out" in fails(capsys, "tiny-kl", file, "--to", "ldm", "--out", "x")
    assert list(tmp_path.iterdir()) == []
