"""Each benchmark at its smallest: all variants do their work, peers compute what ours does, tables come from files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import accelerator, growth
from benchmarks.__main__ import IN_TURNS
from benchmarks.accelerator import Accelerator
from benchmarks.encode import Encode
from benchmarks.finetune import FinetuneStep
from benchmarks.generator import GeneratorStep
from benchmarks.group_norm import GroupNorms
from benchmarks.growth import Growth
from benchmarks.harness import Operations, Work, measure, table
from benchmarks.maskgit import MaskgitStep
from benchmarks.nearest_code import NearestCode
from benchmarks.precision_recall import PrecisionRecall
from benchmarks.reader import Reader
from benchmarks.sample import Sample
from benchmarks.score import Score
from benchmarks.tables import PAGE, write_tables

SMALLEST: dict[str, Work] = {
    "finetune": FinetuneStep(autoencoder="tiny-kl", image_size=128, batch_size=2, perceptual="none"),
    "encode": Encode(autoencoder="tiny-kl", image_size=32, num_images=2),
    "reader": Reader(num_images=8, batch_size=4, num_batches=2),
    "generator": GeneratorStep(recipe="dit-ti-8", batch_size=1),
    "maskgit": MaskgitStep(recipe="maskgit-ti", side=4, num_codes=8, num_classes=3, batch_size=2),
    "sample": Sample(recipe="sit-ti-8", batch_size=1, num_steps=2),
    "score": Score(num_images=12, image_size=32),
    "precision-recall": PrecisionRecall(num_images=30),
    "group-norm": GroupNorms(channels=16, groups=8, image_size=16, repetitions=1),
    "nearest-code": NearestCode(num_images=2, num_tokens=4, num_codes=16, width=8),
}
CASES = [(name, way) for name, work in SMALLEST.items() for way in work.ways()]


def test_each_has_its_smallest():
    assert set(IN_TURNS) == set(SMALLEST) | {"evaluate"}  # whose variants are commands of two commits


@pytest.mark.parametrize(("name", "way"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_turn(name: str, way: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    turn = replace(SMALLEST[name], device="cpu", threads=1).ways()[way].prepare(tmp_path)
    assert turn()["units"] >= 1


@pytest.mark.parametrize("name", ["generator", "maskgit", "sample", "nearest-code", "group-norm"])
def test_peers_compute_the_same(name: str):
    replace(SMALLEST[name], device="cpu").check()


def test_scores_agree(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    work = replace(SMALLEST["score"], device="cpu")
    plain, ours = (work.ways()[way].prepare(tmp_path)() for way in ("one by one", "ours"))
    assert ours["fd"] == pytest.approx(plain["fd"], rel=0.02)
    assert (ours["precision"], ours["recall"]) == (plain["precision"], plain["recall"])


@pytest.mark.slow
def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = NearestCode(num_images=4, num_codes=512, device="cpu", threads=1, variants=("broadcasted",))
    figures = measure(work)
    assert {name: len(row["turns"]) for name, row in figures["variants"].items()} == {"cdist": 3, "broadcasted": 3}
    ratio = figures["ratios"]["broadcasted"]["times_less_cpu"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] < 1
    assert table(figures).count("\n") == 3
    with pytest.raises(SystemExit, match="no variant 'twice'; there are 'cdist', 'ours', 'broadcasted'"):
        measure(replace(work, variants=("twice",)))


def test_operations_are_counted():
    x, layer = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 5, 3, padding=1)
    with Operations() as operations:
        layer(x).sum().backward()
    assert operations.count == 2 * 2 * (2 * 5 * 3 * 9 * 64)  # the pass itself, and the weight's gradient


def test_operations_of_composite_functions_are_counted_in_inference_too():
    x, layer = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 5, 3, padding=1)
    query = torch.randn(2, 4, 16, 8)
    with torch.inference_mode(), Operations() as operations:
        layer(x)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert operations.count == 2 * (2 * 5 * 3 * 9 * 64) + 2 * (2 * 2 * 4 * 16 * 16 * 8)


@pytest.mark.slow
def test_how_a_stage_grows(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    growth.run("growth", Growth(only=("open a folder", "read a cache once"), times=10, json=tmp_path / "growth.json"))
    figures = json.loads((tmp_path / "growth.json").read_text())
    assert [len(stage["rows"]) for stage in figures["stages"]] == [2, 2]
    assert growth.table(figures).count("\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", growth.STAGES, ids=lambda stage: f"{stage.name} {stage.axis}")
def test_each_stage_at_its_smallest(stage: growth.Stage, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    stage.prepare(tmp_path, stage.sizes[0])()


@pytest.mark.slow
def test_an_accelerator_is_rehearsed(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    options = Accelerator(out=tmp_path / "out", rehearse=True, device="cpu", threads=1)
    accelerator.run("accelerator", options)
    assert {path.name for path in options.out.iterdir()} == {f"{case}.json" for case in accelerator.SMALLEST}
    capfd.readouterr()
    accelerator.run("accelerator", options)
    assert capfd.readouterr().out == ""  # nothing is measured twice


def test_the_page_is_that_of_the_files(tmp_path: Path):
    for path in PAGE.parent.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    write_tables(tmp_path / PAGE.name)
    assert (tmp_path / PAGE.name).read_text() == PAGE.read_text()


def test_a_table(tmp_path: Path):
    each = {"sec": 0.5, "cpu_sec": 0.4, "per_sec": 2.0, "precision": "fp32", "peak_mib": 1000.0, "flops": 1e9}
    ratio = {key: {"median": 2.0, "low": 1.5, "high": 2.5} for key in ("times_faster", "times_less_cpu")}
    bf16 = {"precision": "bf16"}
    figures = {
        "benchmark": "x", "unit": "step", "command": "python -m benchmarks x", "date": "2026-11-26", "commit": "abc",
        "machine": {"cpu": "CPU", "device": "CPU", "num_threads": 2, "load_average": 0.5}, "versions": {"torch": "2"},
        "variants": {"peer": each | {"share_of_peak": 0.25}, "ours": each | {"share_of_peak": 0.5} | bf16},
        "ratios": {"ours": ratio},
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(figures))
    page = tmp_path / "README.md"
    page.write_text("Before.\n\n<!-- x.json -->\nold\n<!-- end -->\n\nAfter.\n")
    write_tables(page)
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- x.json -->\n    python -m benchmarks x\n")
    assert "| ours | 500 | 400 | **2.00** (1.50 to 2.50) | **2.00** (1.50 to 2.50) | 1,000 | 50% of bf16 |" in text
    assert text.endswith("<!-- end -->\n\nAfter.\n")
