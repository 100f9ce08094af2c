"""MaskGIT by the same commands as DiT: encode, train, sample, score; resumed, shared among processes, refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import eqvae.runs.train as generator_run
from eqvae.artifacts.files import read_journal, read_json, read_tensors
from eqvae.cli import run

pytestmark = pytest.mark.usefixtures("known_peak")

CPU = ["--precision", "fp32", "--device", "cpu"]
TRAIN = [
    "--max-steps", "4", "--batch-size", "4", "--log-every", "1", "--checkpoint-every", "2", "--watch-steps", "2",
    "--sample-every", "100", "--num-watch-samples", "4", "--ema-decay", "0.5",
    "--lr-warmup-steps", "0", *CPU,
]  # fmt: skip
SAMPLE = ["--num-samples", "6", "--num-steps", "3", "--batch-size", "4", *CPU]


def encode(autoencoder: str, data: Path, out: Path) -> Path:
    flags = ["--image-size", "32", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    assert run(["encode", autoencoder, "--data", f"{data}", "--out", f"{out}", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """By recipe: 4 x 4 tokens of 1,024 codes, and latents of 4 x 4 x 4."""
    folder = tmp_path_factory.mktemp("caches")
    return {
        "maskgit-ti": encode("untrained:tiny-vq", data, folder / "tokens"),
        "dit-ti-2": encode("untrained:tiny-kl", data, folder / "latents"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, caches: dict[str, Path]) -> dict[str, Path]:
    """By recipe: a run of two steps, by the same flags."""
    folder = tmp_path_factory.mktemp("runs")
    for recipe, cache in caches.items():
        assert run(["train", recipe, "--latents", f"{cache}", "--out", f"{folder / recipe}", *TRAIN]) == 0
    return {recipe: folder / recipe for recipe in caches}


@pytest.fixture
def training(caches: dict[str, Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line of `eqvae train`; later flags win."""

    def make(*more: object, out: str = "run", recipe: str = "maskgit-ti", cache: str = "maskgit-ti") -> list[str]:
        return ["train", recipe, "--latents", f"{caches[cache]}", "--out", f"{tmp_path / out}", *TRAIN, *map(str, more)]

    return make


@pytest.fixture
def sampling(trained: dict[str, Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line of `eqvae sample`; later flags win."""

    def make(*more: object, out: str = "drawn", recipe: str = "maskgit-ti") -> list[str]:
        return ["sample", f"{trained[recipe]}", "--out", f"{tmp_path / out}", *SAMPLE, *map(str, more)]

    return make


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[list[str]], str]:
    """Runs a command, which must fail in one line and write nothing, and returns the line."""

    def check(arguments: list[str]) -> str:
        before = sorted(tmp_path.iterdir())
        assert run(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("eqvae: ")
        assert sorted(tmp_path.iterdir()) == before
        return line

    return check


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def images_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"]


def checkpoint(out: Path) -> dict[str, Tensor]:
    return read_tensors(out / "checkpoint.safetensors")[0]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_journal(out) if record["kind"] == "train"]


# Nobody needs to know that it is another kind of generator ----------------------------------------------------------


def test_a_run_holds_the_same_files_as_a_dits(trained):
    maskgit, dit = trained["maskgit-ti"], trained["dit-ti-2"]
    assert files_of(maskgit) == files_of(dit)
    assert read_json(maskgit / "metrics.json").keys() == read_json(dit / "metrics.json").keys()
    assert run(["report", f"{maskgit}", "--out", f"{maskgit}.html"]) == run(
        ["report", f"{dit}", "--out", f"{dit}.html"]
    )


def test_the_plan_says_what_the_tokens_are(training, tmp_path, capsys):
    assert run(training("--dry-run")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "memory_unknown" not in plan
    assert (plan["num_tokens"], plan["codebook_size"], plan["num_classes"]) == (16, 1024, 2)
    assert plan["config"]["recipe"] == "maskgit-ti"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("dit-ti-2", ()), ("maskgit-ti", ()), ("maskgit-ti", ("--sampler", "halton", "--guidance-scale", "2.0"))],
)
def test_samples_are_drawn_and_scored(sampling, data, tmp_path, capsys, recipe, more):
    assert run(sampling(*more, recipe=recipe)) == 0
    drawn = tmp_path / "drawn"
    assert capsys.readouterr().out == (
        f"6 samples in '{drawn / 'samples.npz'}', a sheet of them in '{drawn / 'samples.png'}'\n"
    )
    assert images_of(drawn).shape == (6, 32, 32, 3)
    scoring = ["--reference", f"{data}", "--features", "efficientnet-lite0", "--num-workers", "0", "--device", "cpu"]
    assert run(["score", f"{drawn / 'samples.npz'}", "--out", f"{tmp_path / 'score'}", *scoring]) == 0
    assert read_json(tmp_path / "score" / "metrics.json")["fd_efficientnet_lite0"] > 0
    assert "fd_efficientnet_lite0" in capsys.readouterr().out


def test_the_two_samplers_draw_other_images_and_each_of_them_again_the_same(sampling, tmp_path):
    for out, sampler in (("one", "confidence"), ("again", "confidence"), ("other", "halton")):
        assert run(sampling("--sampler", sampler, "--batch-size", 3 if out == "again" else 6, out=out)) == 0
    one, again, other = (images_of(tmp_path / out).astype(int) for out in ("one", "again", "other"))
    assert np.abs(one - again).max() <= 1  # another batch: the decoder's rounding
    assert not np.array_equal(one, other)


# Refused in one line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "cache", "more", "what"),
    [("dit-ti-2", "maskgit-ti", (), "'dit-ti-2' models latents; "),
     ("sit-ti-2", "maskgit-ti", (), "holds tokens. Train a MaskGIT on it"),
     ("maskgit-ti", "dit-ti-2", (), "holds latents. Train a DiT or SiT on it, or encode with a discrete autoencoder"),
     ("dit-ti-2", "dit-ti-2", ("--schedule", "cosine"), "--schedule cosine is MaskGIT's, and 'dit-ti-2' is no MaskGIT"),
     ("dit-ti-2", "dit-ti-2", ("--label-smoothing", 0), "--label-smoothing 0.0 is MaskGIT's"),
     ("sit-ti-2", "dit-ti-2", ("--loss-tokens", "all"), "--loss-tokens all is MaskGIT's"),
     ("maskgit-ti", "maskgit-ti", ("--posterior", "mean"), "--posterior mean is DiT, SiT or GAT's"),
     ("maskgit-ti", "maskgit-ti", ("--path", "gvp"), "--path gvp is SiT's"),
     ("maskgit-ti", "maskgit-ti", ("--repa-weight", 1), "--repa-weight 1.0 is REPA's"),
     ("maskgit-ti", "maskgit-ti", ("--schedule", "cosin"), "cosin"),
     ("maskgit-ti", "maskgit-ti", ("--label-smoothing", 1), "label-smoothing"),
     ("maskgit-xl", "maskgit-ti", (), "Did you mean 'maskgit-"),
     ("maskgit-ti", "maskgit-ti", ("--autoencoder", "untrained:tiny-vq-f4"), "has other weights")],
)  # fmt: skip
def test_training_that_does_not_fit(training, fails, recipe, cache, more, what):
    assert what in fails(training(*more, recipe=recipe, cache=cache))


@pytest.mark.parametrize(
    ("recipe", "more", "what"),
    [("maskgit-ti", ("--sampler", "ddpm"), "--sampler ddpm is not for 'maskgit-ti'. Use confidence or halton"),
     ("maskgit-ti", ("--ddim-eta", 1), "--ddim-eta 1.0 is not for 'maskgit-ti'. Leave it out"),
     ("maskgit-ti", ("--guidance-high", 0.7), "--guidance-high 0.7 is not for 'maskgit-ti'"),
     ("maskgit-ti", ("--temperature", 0), "temperature"), ("maskgit-ti", ("--top-k", 0), "top-k"),
     ("maskgit-ti", ("--classes", "2"), "Class 2 is not one"),
     ("maskgit-ti", ("--autoencoder", "untrained:tiny-kl"), "has other weights"),
     ("dit-ti-2", ("--sampler", "halton"), "--sampler halton is not for 'dit-ti-2'. Use ddpm or ddim"),
     ("dit-ti-2", ("--temperature", 0.9), "--temperature 0.9 is not for 'dit-ti-2'. Leave it out"),
     ("dit-ti-2", ("--top-k", 5), "--top-k 5 is not for 'dit-ti-2'"),
     ("dit-ti-2", ("--schedule", "arccos"), "--schedule arccos is not for 'dit-ti-2'"),
     ("dit-ti-2", ("--choice-temperature", 0), "--choice-temperature 0.0 is not for 'dit-ti-2'"),
     ("dit-ti-2", ("--guidance-schedule", "linear"), "--guidance-schedule linear is not for 'dit-ti-2'")],
)  # fmt: skip
def test_sampling_that_does_not_fit(sampling, fails, recipe, more, what):
    assert what in fails(sampling(*more, recipe=recipe))


# Stopped and continued ----------------------------------------------------------------------------------------------


class PowerCutError(Exception):
    """Ends a run where nothing can be saved any more."""


@pytest.mark.parametrize(("stopped_by", "at_step"), [("SIGTERM", 2), ("a power cut", 3)])
def test_four_steps_are_two_a_stop_and_two_more(training, tmp_path, capsys, monkeypatch, stopped_by, at_step):
    assert run(training(out="straight")) == 0
    take_step = generator_run.train_step

    def take_step_until(state, *others):
        if stopped_by == "a power cut" and state.step == at_step:  # one step after the last checkpoint
            raise PowerCutError
        figures = take_step(state, *others)
        if stopped_by == "SIGTERM" and state.step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(generator_run, "train_step", take_step_until)
        if stopped_by == "SIGTERM":
            assert run(training(out="broken")) == 130
            assert "eqvae: interrupted, SIGTERM at step 2; " in capsys.readouterr().err
        else:
            with pytest.raises(PowerCutError):
                run(training(out="broken"))
    saved = read_tensors(tmp_path / "broken" / "checkpoint.safetensors")[1]
    assert json.loads(saved["numbers"])["step"] == 2
    assert not (tmp_path / "broken" / "metrics.json").exists()
    assert run(training(out="broken")) == 0
    one, other = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "broken")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


# Processes of their own ---------------------------------------------------------------------------------------------


def torchrun(arguments: list[str]) -> str:
    """Run a command in two processes; returns what they print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eqvae"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_as_one(training, data, tmp_path):
    more = ("--gradient-accumulation-steps", 2, "--reference", data, "--lr-warmup-steps", 2)
    (line,) = torchrun(training(*more, out="two")).splitlines()
    assert f"generator in '{tmp_path / 'two'}'" in line
    torch.set_num_threads(1)
    assert run(training(*more, out="one")) == 0
    assert [step for step, _ in losses(tmp_path / "two")] == [1, 2, 3, 4]
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), rtol=1e-5, atol=1e-6
    )
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith("ema."):  # Adam's first steps turn rounding of tiny gradients into steps of 1e-4
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)
    found, expected = (read_json(tmp_path / out / "metrics.json")["fd_efficientnet_lite0"] for out in ("two", "one"))
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["confidence", "halton"])
def test_two_processes_draw_the_same_images(sampling, tmp_path, sampler):
    more = ("--num-samples", 300, "--batch-size", 64, "--sampler", sampler)  # two parts
    assert len(torchrun(sampling(*more, out="two")).splitlines()) == 1
    torch.set_num_threads(1)
    assert run(sampling(*more, out="one")) == 0
    assert np.array_equal(images_of(tmp_path / "two"), images_of(tmp_path / "one"))
