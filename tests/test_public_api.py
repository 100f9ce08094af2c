"""The public API: every command is a typed function of its configuration, and the command line starts at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eqvae

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
from pathlib import Path

from eqvae import CompareConfig, ConvertConfig, EncodeConfig, EvaluateConfig, FinetuneConfig, RankConfig, ReportConfig
from eqvae import AdaptConfig, PushConfig, ReproduceConfig, SampleConfig, ScoreConfig, TrainConfig, adapt
from eqvae import compare, convert, encode, evaluate, finetune, push, rank, report, reproduce, sample, score, train

out = Path("runs")
finetune(FinetuneConfig(autoencoder="tiny-kl", data="photos", out=out / "eq"))
evaluate(EvaluateConfig(autoencoder="runs/eq", data="photos", out=out / "evaluation"))
encode(EncodeConfig(autoencoder="runs/eq", data="photos", out=out / "latents"))
train(TrainConfig(recipe="dit-s-2", latents=out / "latents", out=out / "dit"))
adapt(AdaptConfig(run=out / "dit", latents=out / "new-latents", out=out / "adapted"))
sample(SampleConfig(run="runs/dit", out=out / "samples"))
score(ScoreConfig(samples=out / "samples", reference="photos", out=out / "score"))
compare(CompareConfig(runs=(out / "dit", out / "other"), out=out / "comparison"))
rank(RankConfig(autoencoders=("tiny-kl", "runs/eq"), out=out / "ranking"))
reproduce(ReproduceConfig(items=("table5",), out=out / "paper"))
report(ReportConfig(folders=(out / "eq",), out=out / "report.html"))
convert(ConvertConfig(source="runs/eq", destination=out / "vae.safetensors", to="ldm"))
push(PushConfig(run=out / "eq", name="./model", license="mit"))
"""


def test_public_names_can_be_imported():
    for name in eqvae.__all__:
        assert getattr(eqvae, name) is not None
    assert set(eqvae.__all__) <= set(dir(eqvae))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = eqvae.nonsense


@pytest.mark.slow
def test_a_users_script_passes_strict_type_checking(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path), "script.py"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "limit_sec"), [(["--help"], 0.2), (["finetune", "--help"], 4.0)])
def test_help_comes_at_once(arguments, limit_sec):
    """Of the processor's time: other tests run beside this one."""

    def spent_sec() -> float:
        before, began_sec = os.times(), time.monotonic()
        subprocess.run([sys.executable, "-m", "eqvae", *arguments], check=True, capture_output=True)
        after = os.times()
        busy_sec = after.children_user + after.children_system - before.children_user - before.children_system
        return min(busy_sec, time.monotonic() - began_sec)

    assert min(spent_sec() for _ in range(3)) < limit_sec
