"""GAT by the same commands as the others: finetune, encode, train, sample, score, report, convert; resumed, shared."""

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
from eqvae.errors import NotFiniteError

pytestmark = pytest.mark.usefixtures("known_peak")

CPU = ["--precision", "fp32", "--device", "cpu"]
TRAIN = [
    "--max-steps", "4", "--batch-size", "4", "--log-every", "1", "--checkpoint-every", "2", "--sample-every", "100",
    "--num-watch-samples", "4", "--ema-decay", "0.5", "--penalty-every", "2", *CPU,
]  # fmt: skip
SCORING = ["--features", "efficientnet-lite0", "--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with `tuned`, its `latents` of 4 x 4 x 4, and `gat`, a run of four steps on them."""
    folder = tmp_path_factory.mktemp("line")
    short = ["--image-size", "32", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"]
    tuning = ["--data", f"{data}", "--validation-data", f"{data}", "--max-steps", "2", "--perceptual", "none",
              "--adversarial-weight", "0", "--num-validation-images", "4", "--num-statistics-images", "4",
              "--lr-warmup-steps", "0"]  # fmt: skip
    assert run(["finetune", "untrained:tiny-kl", "--out", f"{folder / 'tuned'}", *short, *tuning]) == 0
    assert run(["encode", f"{folder / 'tuned'}", "--data", f"{data}", "--out", f"{folder / 'latents'}", *short]) == 0
    watched = ["--reference", f"{data}", "--sample-every", "2"]
    assert run(["train", "gat-ti-2", "--latents", f"{folder / 'latents'}", "--out", f"{folder / 'gat'}", *TRAIN,
                *watched]) == 0  # fmt: skip
    return folder


@pytest.fixture
def training(line: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line of `eqvae train`; later flags win."""

    def make(*more: object, out: str = "run", recipe: str = "gat-ti-2") -> list[str]:
        return ["train", recipe, "--latents", f"{line / 'latents'}", "--out", f"{tmp_path / out}", *TRAIN,
                *map(str, more)]  # fmt: skip

    return make


@pytest.fixture
def sampling(line: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line of `eqvae sample`; later flags win."""

    def make(*more: object, out: str = "drawn", source: Path | None = None) -> list[str]:
        given = ["--num-samples", "6", "--batch-size", "4", *CPU]
        return ["sample", f"{source or line / 'gat'}", "--out", f"{tmp_path / out}", *given, *map(str, more)]

    return make


def images_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"].astype(int)


def checkpoint(out: Path) -> dict[str, Tensor]:
    return read_tensors(out / "checkpoint.safetensors")[0]


def figures(out: Path) -> list[dict]:
    clocks = ("images_per_sec", "share_of_peak", "training_sec")
    return [{name: record[name] for name in record if name not in clocks} for record in read_journal(out)]


def test_the_whole_line(line, sampling, data, tmp_path, capsys):
    watched = [record for record in read_journal(line / "gat") if record["kind"] == "validation"]
    assert [record["step"] for record in watched] == [2, 4]
    assert all(record["fd_efficientnet_lite0"] > 0 for record in watched)
    assert len(list((line / "gat" / "samples").iterdir())) == 2
    assert run(sampling()) == 0
    assert run(["score", f"{tmp_path / 'drawn'}", "--reference", f"{data}", "--out", f"{tmp_path / 'score'}",
                *SCORING]) == 0  # fmt: skip
    assert read_json(tmp_path / "score" / "metrics.json")["fd_efficientnet_lite0"] > 0
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert run(["report", f"{line / 'gat'}", f"{tmp_path / 'drawn'}", "--out", f"{page}"]) == 0
    text = page.read_text()
    assert "gat-ti-2" in text
    assert "Squared gradient at true latents" in text
    assert "one-pass" in text


def test_the_plan_counts_both_networks(training, tmp_path, capsys):
    assert run(training("--dry-run")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "memory_unknown" not in plan
    assert (plan["num_tokens"], plan["num_classes"], plan["latent_size"]) == (4, 2, [4, 4, 4])
    assert plan["num_parameters"] + plan["num_discriminator_parameters"] > 4e6
    assert {"r1_weight", "normalization"} <= plan["config"].keys()
    assert not {"qk_norm", "path", "teacher", "schedule"} & plan["config"].keys()
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_one_pass_is_worked_out(sampling, capsys):
    assert run(sampling("--truncation", 0.3, "--guidance-scale", 1.5, "--dry-run")) == 0
    assert "memory_unknown" not in json.loads(capsys.readouterr().out)


def test_an_image_is_the_same_in_any_batch_and_another_when_asked(sampling, tmp_path):
    for out, more in {
        "one": (), "again": ("--batch-size", 3), "mean": ("--truncation", 1.0), "guided": ("--guidance-scale", 2.0),
        "other": ("--seed", 1),
    }.items():  # fmt: skip
        assert run(sampling(*more, out=out)) == 0
    one, again, mean, guided, other = (images_of(tmp_path / out) for out in ("one", "again", "mean", "guided", "other"))
    assert np.abs(one - again).max() <= 1  # another batch: the decoder's rounding
    assert np.abs(mean[0] - mean[2]).max() <= 1  # one class, one style
    assert np.abs(mean[0] - mean[1]).max() > 1
    assert all(not np.array_equal(one, each) for each in (mean, guided, other))


def test_to_the_authors_layout_and_back(line, sampling, tmp_path):
    assert run(["convert", f"{line / 'gat'}", f"{tmp_path / 'gat.pt'}", "--to", "official"]) == 0
    kept = torch.load(tmp_path / "gat.pt", weights_only=True)
    assert {"x_embedder.proj.weight", "w_avg", "feat_rope.freqs_cos"} <= kept["ema"].keys()
    assert run(["convert", f"{tmp_path / 'gat.pt'}", f"{tmp_path / 'back'}", "--recipe", "gat-ti-2", "--autoencoder",
                f"{line / 'tuned'}"]) == 0  # fmt: skip
    runs = line / "gat", tmp_path / "back"
    one, other = (read_tensors(folder / "generator" / "ema.safetensors")[0] for folder in runs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert run(sampling(source=tmp_path / "back")) == 0


def test_bf16_and_what_saves_memory_from_another_runs_weights(line, training, tmp_path):
    more = (
        "--init",
        line / "gat",
        "--precision",
        "bf16",
        "--posthoc-ema",
        "--gradient-checkpointing",
        "--gradient-accumulation-steps",
        2,
    )
    assert run(training(*more, "--max-steps", 1)) == 0
    assert np.isfinite(figures(tmp_path / "run")[0]["loss"])
    assert len(list((tmp_path / "run" / "snapshots").iterdir())) == 2


@pytest.mark.parametrize(
    ("more", "what"),
    [(("--num-steps", 20), "--num-steps 20 is not for 'gat-ti-2'. It takes one pass"),
     (("--sampler", "ddpm"), "--sampler ddpm is not for 'gat-ti-2'. Use one-pass"),
     (("--top-k", 5), "--top-k 5 is not for 'gat-ti-2'"), (("--ddim-eta", 1), "--ddim-eta 1.0 is not for"),
     (("--guidance-high", 0.7), "--guidance-high 0.7 is not for"), (("--truncation", 1.5), "--truncation is 1.5")],
)  # fmt: skip
def test_sampling_that_does_not_fit(sampling, tmp_path, capsys, more, what):
    assert run(sampling(*more)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert what in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "more", "what"),
    [("gat-ti-2", ("--qk-norm",), "--qk-norm True is DiT or SiT's"), ("gat-ti-2", ("--path", "gvp"), "is SiT's"),
     ("gat-ti-2", ("--label-dropout", 0.1), "--label-dropout 0.1 is not for 'gat-ti-2'"),
     ("gat-ti-2", ("--watch-steps", 4), "--watch-steps 4 is not for"),
     ("gat-ti-2", ("--shard",), "--shard is not for 'gat-ti-2'"),
     ("gat-ti-2", ("--penalty-every", 0), "--penalty-every is 0"),
     ("sit-ti-2", ("--watch-steps", 4), "--penalty-every 2 is GAT's, and 'sit-ti-2' is no GAT")],
)  # fmt: skip
def test_training_that_does_not_fit(training, tmp_path, capsys, recipe, more, what):
    assert run(training(*more, recipe=recipe)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert what in said
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def straight(line: Path) -> Path:
    """A run of four steps that nothing stopped."""
    out = line / "straight"
    assert run(["train", "gat-ti-2", "--latents", f"{line / 'latents'}", "--out", f"{out}", *TRAIN,
                "--posthoc-ema"]) == 0  # fmt: skip
    return out


class PowerCutError(Exception):
    """Ends a run where nothing can be saved any more."""


@pytest.mark.parametrize(("ended_by", "at_step"), [("SIGTERM", 2), ("a power cut", 3), ("divergence", 2)])
def test_four_steps_are_two_a_stop_and_two_more(training, straight, tmp_path, capsys, monkeypatch, ended_by, at_step):
    take_step = generator_run.adversarial_step

    def take_step_until(state, *others):
        if ended_by == "a power cut" and state.step == at_step:  # one step after the last checkpoint
            raise PowerCutError
        if ended_by == "divergence" and state.step == at_step:
            raise NotFiniteError("loss nan")
        taken = take_step(state, *others)
        if ended_by == "SIGTERM" and state.step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(generator_run, "adversarial_step", take_step_until)
        if ended_by == "a power cut":
            with pytest.raises(PowerCutError):
                run(training("--posthoc-ema", out="broken"))
        else:
            assert run(training("--posthoc-ema", out="broken")) == (130 if ended_by == "SIGTERM" else 2)
            assert "at step 2" in capsys.readouterr().err
    assert run(training("--posthoc-ema", out="broken")) == 0
    one, other = checkpoint(straight), checkpoint(tmp_path / "broken")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert figures(tmp_path / "broken") == figures(straight)


@pytest.mark.slow
def test_two_processes_train_as_one(training, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eqvae"]
    more = ("--gradient-accumulation-steps", 2, "--learning-rate", 1e-5)  # Adam's first steps blow up last digits
    done = subprocess.run(
        [sys.executable, *launcher, *training(*more, out="two")], capture_output=True, text=True, check=False,
        timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    assert run(training(*more, out="one")) == 0
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert len(one) == len(two) == 5
    for ours, theirs in zip(two, one, strict=True):
        assert (ours.pop("kind"), ours.keys()) == (theirs.pop("kind"), theirs.keys())
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
