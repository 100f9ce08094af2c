"""The page: complete, self-contained, honest about what may not be compared, and clear about wrong input."""

import base64
import io
import os
import re
import tomllib
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from eqvae.artifacts.files import write_json
from eqvae.cli import run
from eqvae.drawing import write_report
from eqvae.errors import UserError


@pytest.fixture
def page(tmp_path):
    """Write the report of some folders and read it."""

    def write(*folders):
        out = tmp_path / "out" / "report.html"
        write_report(folders, out)
        return out.read_text(encoding="utf-8")

    return write


def test_the_headline_says_what_changed(page, two_evaluations):
    text = page(*two_evaluations)
    assert "Rotation error −47%, scale error −52%, PSNR −0.30 dB." in text  # noqa: RUF001
    assert "Measured on 2 images of photos, 32 px." in text


def test_nothing_is_loaded_from_elsewhere(page, two_evaluations, run_folder):
    text = page(*two_evaluations, run_folder)
    sources = re.findall(r'\bsrc="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    links = re.findall(r'<(\w+)[^>]*?\bhref="([^"]*)"', text)
    assert {tag for tag, target in links if not target.startswith(("#", "data:"))} == {"a"}
    assert "<script" not in text
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_every_picture_has_a_text_and_headings_do_not_skip_a_level(page, two_evaluations, run_folder):
    text = page(*two_evaluations, run_folder)
    assert len(re.findall("<img ", text)) == len(re.findall(r'<img [^>]*alt="[^"]+"', text)) == 2 * 3 + 2 * 2 * 4
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_a_whole_turn_moves(page, pictures, write_evaluation):
    frames = torch.randint(256, (2, 5, *pictures(0).images.shape[1:]), dtype=torch.uint8)
    text = page(*(write_evaluation(name, replace(pictures(0), turned=frames)) for name in ("base", "finetuned")))
    assert "A whole turn, base, finetuned: τ∘x, D(τ∘E(x))" in text
    encoded = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", text)
    counts = [getattr(Image.open(io.BytesIO(base64.b64decode(each))), "n_frames", 1) for each in encoded]
    assert (max(counts), counts.count(1)) == (5, len(counts) - 1)


def test_one_evaluation_is_enough(page, two_evaluations):
    text = page(two_evaluations[0])
    assert "Rotation error 0.900, scale error 0.800, PSNR 26.00 dB." in text
    assert "Fine-tuning" not in re.sub(r"Fine-tuning moves", "", text)


def test_a_run_alone_is_enough(page, run_folder):
    text = page(run_folder)
    assert "Rotation error −47%" in text  # noqa: RUF001
    assert "run: 1 broken image was left out: cat.jpg." in text
    assert text.count("the discriminator wins") == 5
    assert "2 more messages of the watchdog" in text
    assert "Latent maps" not in text


def test_the_run_behind_an_autoencoder_is_found(page, write_evaluation, run_folder):
    folder = write_evaluation("eq", config={"autoencoder": str(run_folder / "autoencoder")}, psnr_db=20.0)
    text = page(folder)
    assert "<h1>run</h1>" in text
    assert "Fine-tuning: run" in text


def test_errors_that_rise_are_not_called_a_success(page, write_evaluation):
    text = page(
        write_evaluation("a", equivariance_error_rotation=0.5, equivariance_error_scale=0.5, psnr_db=20.0),
        write_evaluation("b", equivariance_error_rotation=0.6, equivariance_error_scale=0.4, psnr_db=20.0),
    )
    assert "Rotation error +20%, scale error −20%, PSNR +0.00 dB." in text  # noqa: RUF001


def test_other_images_are_not_compared_silently(page, pictures, write_evaluation):
    other = replace(pictures(1), images=255 - pictures(1).images)
    text = page(
        write_evaluation("a", pictures(0), psnr_db=20.0),
        write_evaluation("b", other, config={"data": "elsewhere"}, psnr_db=30.0),
    )
    assert "Measured under different conditions: no change is computed." in text
    assert "a on 2 images of photos, 32 px; b on 2 images of elsewhere, 32 px" in text
    assert "Latent maps of a</h2>" in text
    assert "Latent maps of b</h2>" in text


def test_other_channel_counts_are_said(page, pictures, write_evaluation):
    text = page(write_evaluation("a", pictures(0), psnr_db=20.0), write_evaluation("b", pictures(1, channels=16)))
    assert "Numbers of channels differ, so projections do too" in text


def test_an_evaluation_without_pictures_is_said(page, write_evaluation):
    assert "a: the evaluation has no pictures." in page(write_evaluation("a", psnr_db=20.0))


def test_names_are_escaped(page, write_evaluation):
    text = page(write_evaluation("a", config={"autoencoder": "<b>&"}, psnr_db=20.0))
    assert "<h1>&lt;b&gt;&amp;</h1>" in text


def test_names_may_be_any_bytes(tmp_path, capsys, write_evaluation):
    folder = write_evaluation("a", config={"data": os.fsdecode(b"caf\xe9")}, psnr_db=20.0)
    out = tmp_path / os.fsdecode(b"page\xe9.html")
    assert run(["report", str(folder), "--out", str(out)]) == 0
    assert "page\\xe9.html" in capsys.readouterr().out
    assert "caf\\xe9" in out.read_text(encoding="utf-8")


def test_one_autoencoder_evaluated_twice_gets_two_names(page, write_evaluation):
    config = {"autoencoder": "sd-vae"}
    text = page(write_evaluation("first", config=config), write_evaluation("second", config=config))
    assert "sd-vae (first) → sd-vae (second)" in text


def test_wrong_input_is_one_line(page, tmp_path, write_evaluation, two_evaluations):
    with pytest.raises(UserError, match="No folder"):
        page()
    with pytest.raises(UserError, match=r"missing' does not exist"):
        page(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json' does not exist"):
        page(tmp_path / "empty")
    write_json(tmp_path / "other" / "config.json", {"command": "encode"})
    with pytest.raises(UserError, match="written by 'eqvae encode'"):
        page(tmp_path / "other")
    unfinished = write_evaluation("unfinished")
    (unfinished / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"no metrics\.json"):
        page(unfinished)
    with pytest.raises(UserError, match="is a folder"):
        write_report(two_evaluations, tmp_path)


def test_the_pages_parts_are_installed_with_the_package():
    for name in ("report.css", "report.html.jinja", "parts.html.jinja", "cards.html.jinja", "generators.html.jinja"):
        assert files("eqvae.drawing").joinpath(name).is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/eqvae"]}


def test_an_unfinished_fine_tuning_says_so(page, run_folder):
    assert "not finished, steps 40." in page(run_folder)
    write_json(run_folder / "metrics.json", {"num_steps": 40})
    assert "not finished" not in page(run_folder)
