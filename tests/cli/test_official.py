"""Official generators through the commands: convert, sample, train --init, score, and back, bit for bit."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eqvae.artifacts.files import read_json, read_tensors
from eqvae.artifacts.names import GENERATOR, weights_name
from eqvae.autoencoders.presets import PACKAGED
from eqvae.cli import run
from eqvae.generators.checkpoints import read_card, write_generator
from eqvae.generators.families import find_recipe
from eqvae.generators.protocol import LatentSpecification

AUTOENCODER = "untrained:tiny-kl"
LATENTS = LatentSpecification(channels=4, height=4, width=4, num_classes=2)
CPU = ["--precision", "fp32", "--device", "cpu"]
DRAWING = ["--num-samples", "4", "--num-steps", "2", *CPU]
TRAINING = [
    "--max-steps", "1", "--batch-size", "2", "--num-watch-samples", "2", "--watch-steps", "2", *CPU,
    "--learning-rate", "1e-30",  # too small to change a weight
]  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach for the network, nor spend seconds on measuring the processor."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("eqvae.runs.train.matrix_peak_flops_per_sec", lambda device, precision: 1e12)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of four images of 32 px and two classes."""
    folder, random = tmp_path_factory.mktemp("official"), np.random.default_rng(0)
    for index in range(4):
        path = folder / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    flags = ["--image-size", "32", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    assert run(["encode", AUTOENCODER, "--data", f"{folder}/data", "--out", f"{folder}/cache", *flags]) == 0
    return folder / "cache"


def random_weights(recipe: str, seed: int, **changes: object) -> dict[str, Tensor]:
    """Weights under the official names, all of them random."""
    config = replace(find_recipe(recipe).transformer(LATENTS), **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in config.build().state_dict().items()}
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_official(path: Path, container: str, weights: dict[str, dict[str, Tensor]]) -> None:
    """Write a file as `torch.save` leaves it: bare, or as fast-DiT, SiT and REPA keep it while they train."""
    if container == "bare":
        torch.save(weights["ema"], path)
        return
    wrapped = {f"module._orig_mod.{name}": value for name, value in weights["model"].items()}
    others = {"opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(model="DiT-S/2"), "steps": 7}
    torch.save({"model": wrapped, "ema": weights["ema"]} | others, path)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def sample_score_and_train_on(recipe: str, there: Path, cache: Path, tmp_path: Path, ema: dict[str, Tensor]) -> None:
    assert run(["sample", f"{there}", "--out", f"{tmp_path / 'samples'}", *DRAWING]) == 0
    scoring = ["--reference", f"{cache.parent / 'data'}", "--features", "efficientnet-lite0", "--num-workers", "0"]
    samples = tmp_path / "samples" / "samples.npz"
    assert run(["score", f"{samples}", "--out", f"{tmp_path / 'score'}", "--device", "cpu", *scoring]) == 0

    teacher = ["--teacher", "efficientnet-lite0"] if recipe.startswith("repa") else []
    out = tmp_path / "run"
    command = ["train", recipe, "--latents", f"{cache}", "--out", f"{out}", "--init", f"{there}", *TRAINING, *teacher]
    assert run(command) == 0
    assert read_json(out / "config.json")["init"] == str(there)
    begun = read_tensors(out / GENERATOR / weights_name("model"))[0]
    projector = {name for name in begun if name.startswith("projectors.")}
    same = begun.keys() - (projector if teacher else set())  # another teacher: its projector begins anew
    assert [name for name in same if not torch.equal(begun[name], ema[name])] == []
    assert bool(projector) == bool(teacher)


@pytest.mark.parametrize("container", ["bare", "fast-DiT's"])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("dit-s-2", {}), ("sit-s-2", {}), ("repa-sit-s-2", {"teacher_channels": 768, "projector_width": 32})],
)
def test_there_and_back(cache: Path, tmp_path: Path, capsys, recipe: str, changes: dict, container: str):
    kinds = ("ema",) if container == "bare" else ("ema", "model")
    weights = {kind: random_weights(recipe, seed, **changes) for seed, kind in enumerate(kinds)}
    write_official(tmp_path / "official.pt", container, weights)
    there, back = tmp_path / "there", tmp_path / "back.pt"
    chosen = ["--recipe", recipe, "--autoencoder", AUTOENCODER, "--normalization", "fixed:0.18215"]
    assert run(["convert", f"{tmp_path / 'official.pt'}", f"{there}", *chosen]) == 0
    assert f"  {recipe}: 2 classes, 32 px, decoder {AUTOENCODER}" in capsys.readouterr().out.splitlines()
    for kind in kinds:
        assert_same(read_tensors(there / GENERATOR / weights_name(kind))[0], weights[kind])
    assert read_card(there).scale == pytest.approx((1 / 0.18215,) * 4)

    if container == "bare":
        assert run(["sample", f"{there}", "--out", f"{tmp_path / 'samples'}", *DRAWING]) == 0
    else:
        sample_score_and_train_on(recipe, there, cache, tmp_path, weights["ema"])

    assert run(["convert", f"{there}", f"{back}", "--to", "official"]) == 0
    found = torch.load(back, weights_only=True)
    for kind in kinds:
        assert_same(found if container == "bare" else found[kind], weights[kind])


def test_a_maskgit_goes_there_and_back(tmp_path: Path):
    tokens = LatentSpecification(channels=1024, height=4, width=4, num_classes=3)
    weights = find_recipe("maskgit-ti").transformer(tokens).build().state_dict()
    torch.save({"iter": 7, "model_state_dict": weights}, tmp_path / "official.pth")
    chosen = ["--recipe", "maskgit-ti", "--autoencoder", "untrained:tiny-vq"]
    assert run(["convert", f"{tmp_path / 'official.pth'}", f"{tmp_path / 'run'}", *chosen]) == 0
    assert read_card(tmp_path / "run").transformer.latents == tokens
    assert run(["convert", f"{tmp_path / 'run'}", f"{tmp_path / 'back.pth'}", "--to", "official"]) == 0
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["model_state_dict"], weights)


def test_the_autoencoders_scaling_factor_is_the_normalization(tmp_path: Path):
    torch.save(random_weights("dit-ti-2", 0), tmp_path / "official.pt")
    chosen = ["--recipe", "dit-ti-2", "--autoencoder", "tiny-kl"]
    assert run(["convert", f"{tmp_path / 'official.pt'}", f"{tmp_path / 'run'}", *chosen]) == 0
    card = read_card(tmp_path / "run")
    config = read_json(PACKAGED / "tiny-kl" / "config.json")
    assert card.scale == pytest.approx((1 / config["scaling_factor"],) * 4)
    assert card.shift == pytest.approx((config["shift_factor"],) * 4)


def test_the_latents_normalization_travels_with_both_sets_of_weights(tmp_path: Path, capsys) -> None:
    weights = {"ema": random_weights("dit-ti-2", 0), "model": random_weights("dit-ti-2", 1)}
    write_official(tmp_path / "official.pt", "fast-DiT's", weights)
    chosen = ["--recipe", "dit-ti-2", "--autoencoder", AUTOENCODER]
    assert run(["convert", f"{tmp_path / 'official.pt'}", f"{tmp_path / 'run'}", *chosen]) == 0
    measured = replace(read_card(tmp_path / "run"), shift=(0.5, -1.0, 2.0, 0.0), scale=(1.0, 2.0, 3.0, 0.5))
    write_generator(tmp_path / "run", measured, weights)  # type: ignore[arg-type]
    assert run(["convert", f"{tmp_path / 'run'}", f"{tmp_path / 'noted.pt'}", "--to", "official"]) == 0
    assert run(["convert", f"{tmp_path / 'noted.pt'}", f"{tmp_path / 'back'}", *chosen]) == 0
    assert read_card(tmp_path / "back") == measured
    noted = torch.load(tmp_path / "noted.pt", weights_only=True)
    for shift, scale in (([0.0] * 3, [1.0] * 3), ([0.0] * 4, [0.0] * 4), ("abcd", [1.0] * 4)):
        torch.save(noted | {"eqvae": json.dumps({"shift": shift, "scale": scale})}, tmp_path / "wrong.pt")
        capsys.readouterr()
        assert run(["convert", f"{tmp_path / 'wrong.pt'}", f"{tmp_path / 'wrong'}", *chosen]) == 2
        assert "--normalization" in capsys.readouterr().err.splitlines()[-1]
    assert (
        run(["convert", f"{tmp_path / 'wrong.pt'}", f"{tmp_path / 'told'}", *chosen, "--normalization", "fixed:2"]) == 0
    )


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, which must fail in one line and write nothing, and returns the line."""

    def check(*arguments: object) -> str:
        before = sorted(tmp_path.iterdir())
        assert run([*map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(tmp_path.iterdir()) == before
        return line

    return check


def test_what_is_no_such_generator_is_refused(tmp_path: Path, fails):
    source, run_folder = tmp_path / "official.pt", tmp_path / "run"
    torch.save(random_weights("dit-ti-2", 0), source)
    dit, kl = ("--recipe", "dit-ti-2"), ("--autoencoder", AUTOENCODER)
    assert "--autoencoder is missing" in fails("convert", source, run_folder, *dit)
    assert "--recipe is missing" in fails("convert", source, run_folder)
    assert "Did you mean 'dit-ti-" in fails("convert", source, run_folder, "--recipe", "dit-ti-3", *kl)
    assert "do not fit the generator" in fails("convert", source, run_folder, "--recipe", "dit-s-2", *kl)
    assert "holds no weights of a 'maskgit-ti'" in fails(
        "convert", source, run_folder, "--recipe", "maskgit-ti", "--autoencoder", "untrained:tiny-vq"
    )
    assert "does not model the latents of" in fails("convert", source, run_folder, "--recipe", "maskgit-ti", *kl)
    assert "does not model the tokens of" in fails(
        "convert", source, run_folder, *dit, "--autoencoder", "untrained:tiny-vq"
    )
    assert "no positive factor" in fails("convert", source, run_folder, *dit, *kl, "--normalization", "fixed:0")
    assert "exists" in fails("convert", source, source, *dit, *kl)
    assert "does not exist" in fails("convert", tmp_path / "no.pt", run_folder, *dit, *kl)
    assert "holds no trained generator" in fails("convert", tmp_path, tmp_path / "back.pt", "--to", "official")
    assert "end in .pt" in fails("convert", tmp_path, tmp_path / "back.safetensors", "--to", "official")
    assert "for an official generator" in fails("convert", source, run_folder, *dit, "--to", "official")


@pytest.mark.parametrize(
    ("recipe", "latents", "more", "what"),
    [("dit-ti-2", {"num_classes": 5}, (), "is of 5 classes, this run of 2 classes"),
     ("dit-ti-2", {"height": 8, "width": 8}, (), "is of latents of 4 x 8 x 8, this run of latents of 4 x 4 x 4"),
     ("dit-ti-1", {}, (), "is a 'dit-ti-2', this run a 'dit-ti-1'"),
     ("dit-ti-2", {}, ("--qk-norm",), "do not fit"),
     ("sit-ti-2", {}, ("--path", "gvp"), "is trained on path linear and velocity, this run trained on path gvp")],
)  # fmt: skip
def test_an_init_that_is_not_alike_is_refused(cache: Path, tmp_path: Path, fails, recipe, latents, more, what):
    given = "sit-ti-2" if recipe.startswith("sit") else "dit-ti-2"
    torch.save(find_recipe(given).transformer(replace(LATENTS, **latents)).build().state_dict(), tmp_path / "given.pt")
    chosen = ["--recipe", given, "--autoencoder", AUTOENCODER]
    assert run(["convert", f"{tmp_path / 'given.pt'}", f"{tmp_path / 'given'}", *chosen]) == 0
    assert what in fails(
        "train", recipe, "--latents", cache, "--out", tmp_path / "run", "--init", tmp_path / "given", *more
    )
