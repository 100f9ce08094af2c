"""`eqvae compare` from end to end: what it prints, wrong input in one line, runs that `eqvae train` wrote."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eqvae.artifacts.files import read_json, write_json
from eqvae.cli import run


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder as `eqvae train` does, without weights."""

    def write(name: str, values: Sequence[float] = (9.0, 6.0, 5.0), **fields: Any) -> Path:
        folder = tmp_path / name
        config = {
            "command": "train", "recipe": "sit-ti-2", "latents": "latents/kl", "latents_fingerprint": "a", "seed": 0,
            "max_steps": 30, "batch_size": 4, "reference": "photos", "features": "inception", "watch_steps": 8,
            "num_watch_samples": 50,
        }  # fmt: skip
        write_json(folder / "config.json", config | fields)
        records = [
            {"kind": "validation", "step": step, "training_sec": 0.5 * step, "fid": value, "num_samples": 50}
            for step, value in zip((10, 20, 30), values, strict=False)
        ]
        (folder / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return write


@pytest.fixture
def eq(write_run) -> Path:
    """A run on other latents, better at each validation."""
    return write_run("eq", [7.0, 5.0, 4.0], latents="latents/kl-eq", latents_fingerprint="b")


def test_the_headline_is_printed(write_run, eq: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run(["compare", str(write_run("base")), str(eq), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    speed, final = printed.out.splitlines()
    assert speed == (
        "sit-ti-2 on kl reaches FID 5.00 after 120 images; sit-ti-2 on kl-eq after 80 images: 1.50 times as fast in "
        "images, 1.50 in training time."
    )
    said = "After 120 images sit-ti-2 on kl-eq has 4.00 against the base's 5.00: \N{MINUS SIGN}1.00; one seed in an arm"
    assert final.startswith(said)
    config = read_json(out / "config.json")
    assert (config["command"], config["runs"][1]) == ("compare", str(eq))
    assert read_json(out / "environment.json")["seed"] == 0


def test_flags_reach_the_comparison(write_run, eq: Path, tmp_path: Path, capsys):
    runs = [str(write_run("base")), str(eq), *(str(write_run(f"seed-{seed}", seed=seed)) for seed in (1, 2))]
    flags = ["--base", "sit-ti-2 on kl-eq", "--num-resamples", "200", "--seed", "3"]
    assert run(["compare", *runs, *flags, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("sit-ti-2 on kl-eq reaches FID 4.00 after 120 images; sit-ti-2 on kl has")
    assert read_json(tmp_path / "out" / "config.json")["num_resamples"] == 200


def test_wrong_input_is_one_line(write_run, eq: Path, tmp_path: Path, capsys):
    base, unwatched = write_run("base"), write_run("unwatched", [], seed=1)
    write_json(tmp_path / "evaluation" / "config.json", {"command": "evaluate"})
    other = write_run("other", latents_fingerprint="c", reference="elsewhere")
    write_json(base / "metrics.json", {"num_steps": 30})  # a run's first result makes the folder its own
    for arguments, what in (
        ([base], "takes two arms or more"),
        ([base, write_run("second", seed=1)], "takes two arms or more"),
        ([base, eq, base], "is given twice"),
        ([base, eq, write_run("twin")], "are the same run"),
        ([base, eq, unwatched], "Train with --reference"),
        ([base, other], "reference photos and elsewhere"),
        ([base, write_run("more", latents_fingerprint="c", num_watch_samples=60)], "num_watch_samples 50 and 60"),
        ([base, write_run("fd", latents_fingerprint="c", features="x")], "features inception and x"),
        ([base, tmp_path / "evaluation"], "was written by 'eqvae evaluate'"),
        ([base, tmp_path / "nowhere"], "does not exist"),
        ([base, eq, "--base", "sit-ti-2 on kl-e"], "Did you mean 'sit-ti-2 on kl-eq'?"),
        ([base, eq, "--num-resamples", 5], "--num-resamples is 5"),
        ([base, eq, "--resamples", 500], "does not know '--resamples'"),
        ([base, eq, "--out", base], "belongs to 'eqvae train'"),
    ):
        assert run(["compare", "--out", str(tmp_path / "out"), *map(str, arguments)]) == 2, what
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("eqvae: ")
        assert what in line
        assert captured.out == ""
        assert not (tmp_path / "out").exists()


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        run(["compare", "--help"])
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("RUN RUN ...", "--out", "--base", "--num-resamples", "--seed"))


@pytest.mark.slow
def test_runs_that_train_wrote(tmp_path: Path, capsys):
    random = np.random.default_rng(0)
    for index in range(4):
        path = tmp_path / "data" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    data = ["--data", str(tmp_path / "data"), "--image-size", "32", "--batch-size", "4", "--num-workers", "0"]
    assert run(["encode", "untrained:tiny-kl", *data, "--out", str(tmp_path / "latents"), "--device", "cpu"]) == 0
    for recipe in ("dit-ti-4", "sit-ti-4"):
        flags = ["--latents", str(tmp_path / "latents"), "--out", str(tmp_path / recipe), "--device", "cpu"]
        flags += ["--max-steps", "2", "--sample-every", "2", "--batch-size", "4", "--log-every", "1"]
        flags += ["--watch-steps", "2", "--num-watch-samples", "2", "--reference", str(tmp_path / "data")]
        assert run(["train", recipe, *flags, "--precision", "fp32"]) == 0
    capsys.readouterr()
    runs = [str(tmp_path / recipe) for recipe in ("sit-ti-4", "dit-ti-4")]
    assert run(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sit-ti-4 on untrained:tiny-kl reaches FD (efficientnet-lite0) ")
    record = read_json(tmp_path / "out" / "comparison.json")
    assert [arm["name"] for arm in record["arms"]] == [
        f"{recipe}-ti-4 on untrained:tiny-kl" for recipe in ("sit", "dit")
    ]
    assert [arm["num_images"] for arm in record["arms"]] == [[8], [8]]
    for arm, folder in zip(record["arms"], runs, strict=True):
        assert arm["mean"][-1] == pytest.approx(read_json(Path(folder) / "metrics.json")["fd_efficientnet_lite0"])
    assert record["num_samples"] == 2
    assert not any("recipes" in note for note in record["notes"])
