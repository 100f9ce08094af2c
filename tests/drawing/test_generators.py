"""Generators in a report: training runs, sample sets and scores, read, compared where they may be, and drawn."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import eqvae.runs.train as generator_run
from eqvae.artifacts.files import read_json, write_json
from eqvae.cli import run
from eqvae.drawing import read_folders, write_figures, write_report
from eqvae.drawing.comparison import findings, measure_label, shared_curves
from eqvae.drawing.panels import training_panels
from eqvae.drawing.pictures import read_sheet, sample_sheet, stages
from eqvae.drawing.summary import drawing_facts, headline, training_facts
from eqvae.drawing.tables import score_tables
from eqvae.errors import UserError

LITE = "fd_efficientnet_lite0"


@pytest.fixture
def page(tmp_path):
    """Write the report of some folders and read it."""

    def write(*folders):
        out = tmp_path / "out" / "report.html"
        write_report(folders, out)
        return out.read_text(encoding="utf-8")

    return write


def training_of(folder):
    (training,) = read_folders([folder]).trainings
    return training


def panels_of(folder):
    return {panel.title: panel for panel in training_panels(training_of(folder))}


def cells_of(table):
    return {name: dict(zip([m.label for m in table.metrics], cells, strict=True)) for name, cells in table.rows}


# Training runs --------------------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(write_training):
    training = training_of(write_training("run", [9.0, 6.0, 5.0]))
    assert training.name == "sit-ti-2 on tiny-kl"
    assert (training.step, training.num_images(training.step), training.is_finished) == (30, 120, True)
    assert list(training.sheets) == [10, 20, 30]
    facts = {"Steps": "30", "Batch size": "4", "Images seen": "120", "Training time": "15 s"}
    assert facts.items() <= training_facts(training).items()


def test_a_loss_that_is_its_only_part_is_drawn_once(write_training):
    panels = panels_of(write_training("sit"))
    assert list(panels) == ["FD (efficientnet-lite0) ↓", "Loss", "Gradient norm", "Pace"]
    assert panels["FD (efficientnet-lite0) ↓"].summary == "9.00 → 5.00"
    assert panels["FD (efficientnet-lite0) ↓"].y_label == "of 50 samples"
    assert panels["Loss"].y_label == "mean squared error"
    assert panels["Pace"].summary == "median 116"


@pytest.mark.parametrize(
    ("parts", "titles"),
    [
        ({"mse": 0.9, "vb": 0.1}, ["Loss", "Squared error", "Variational bound"]),
        ({"mse": 1.5, "repa": -1.0}, ["Loss", "Squared error", "Alignment with the teacher"]),
        ({"cross_entropy": 0.9, "accuracy": 0.2}, ["Loss", "Cross-entropy", "Masked tokens guessed"]),
        ({"something_new": 0.2}, ["Loss", "Something new"]),
        ({}, ["Loss"]),
    ],
)
def test_every_part_of_a_loss_has_a_panel(write_training, parts, titles):
    assert list(panels_of(write_training("run", parts=parts)))[1:-2] == titles


def test_distances_of_other_features_or_counts_have_panels_of_their_own(write_training):
    folder = write_training("run", [9.0, 6.0])
    with (folder / "journal.jsonl").open("a") as journal:
        for step, more in ((30, {LITE: 4.0, "num_samples": 99}), (40, {"fid": 30.0, "num_samples": 50})):
            journal.write(json.dumps({"kind": "validation", "step": step, "training_sec": 20.0, **more}) + "\n")
    found = [panel for panel in training_panels(training_of(folder)) if "samples" in panel.y_label]
    assert [(panel.title[:3].strip(), panel.y_label, panel.summary) for panel in found] == [
        ("FD", "of 50 samples", "9.00 → 6.00"), ("FD", "of 99 samples", "4.00"), ("FID", "of 50 samples", "30.00")
    ]  # fmt: skip


def test_an_unfinished_run_counts_with_what_it_has(page, write_training):
    folder = write_training("run", max_steps=5000)
    (folder / "metrics.json").unlink()
    text = page(folder)
    assert "sit-ti-2 on tiny-kl: not finished, steps 30 of 5,000." in text
    shutil.rmtree(folder / "samples")
    shutil.rmtree(folder / "generator")
    (folder / "journal.jsonl").unlink()
    text = page(folder)
    assert "the run has no journal yet" in text
    assert "Its samples have not been measured. Steps 0 of 5,000," in text
    assert "<img" not in text


def test_a_run_without_a_reference_has_no_distance(page, write_training):
    text = page(write_training("run", key="", reference=None))
    assert "Its samples have not been measured" in text
    assert "Measured</dt>" not in text
    assert text.count("<img ") == 3


def test_the_headline_of_a_run_says_how_far_its_samples_have_come(page, write_training):
    text = page(write_training("run", [9.0, 6.0, 5.0]))
    assert "<h1>sit-ti-2 on tiny-kl</h1>" in text
    assert "FD (efficientnet-lite0) −44% between steps 10 and 30." in text  # noqa: RUF001
    assert "Generator report" in text
    only = page(write_training("once", [9.0]))
    assert "FD (efficientnet-lite0) 9.00 at step 10, its only measurement so far." in only


# Contact sheets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "steps"), [(1, [10]), (2, [10, 20]), (3, [10, 20, 30]), (4, [10, 20, 40]), (7, [10, 40, 70])]
)
def test_first_middle_and_last_stage_are_shown(write_training, num, steps):
    sheets = stages(training_of(write_training("run", [1.0] * num)))
    assert [sheet.label for sheet in sheets] == [f"Step {step}, {4 * step} images" for step in steps]


def test_of_large_pictures_the_first_rows_are_shown_and_small_ones_are_enlarged(write_samples):
    large, small = (
        read_folders([write_samples(f"drawn-{cell_px}", cell_px=cell_px)]).sample_sets[0] for cell_px in (128, 8)
    )
    assert read_sheet(sample_sheet(large)).size == (4 * 130 + 2, 4 * 130 + 2)
    assert read_sheet(sample_sheet(small)).size == (3 * 102, 3 * 102)
    with Image.open(sample_sheet(small).path) as file:
        assert read_sheet(sample_sheet(small)).resize(file.size, Image.Resampling.NEAREST) == file.convert("RGB")


def test_a_broken_sheet_is_one_line(page, write_training):
    folder = write_training("run")
    (folder / "samples" / "step_0000030.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"step_0000030\.png' is no readable picture"):
        page(folder)


# Several runs in one chart --------------------------------------------------------------------------------------------


def test_runs_of_one_measure_share_a_chart(write_training):
    folders = [
        write_training("base", [9.0, 6.0, 5.0]),
        write_training("eq", [7.0, 5.0, 4.0], autoencoder="tiny-kl-eq"),
        write_training("other", [7.0, 5.0, 4.0], num_watch_samples=99),
        write_training("unmeasured", key="", reference=None),
    ]
    (shared,) = shared_curves(read_folders(folders).trainings)
    assert [arm.name for arm in shared.arms] == ["sit-ti-2 on tiny-kl", "sit-ti-2 on tiny-kl-eq"]
    assert measure_label(shared) == "FD (efficientnet-lite0) of 50 samples against photos"
    assert "sit-ti-2 on tiny-kl reaches FD (efficientnet-lite0) 5.00 after 120 images" in findings(shared)[0]
    assert "1.50 times as fast in images" in findings(shared)[0]


def test_seeds_of_one_arm_are_lines_of_their_own(write_training):
    contents = read_folders([write_training(f"seed{seed}", [9.0, 6.0 - seed], seed=seed) for seed in (0, 1)])
    assert [training.name for training in contents.trainings] == [
        "sit-ti-2 on tiny-kl (seed0)", "sit-ti-2 on tiny-kl (seed1)"
    ]  # fmt: skip
    (shared,) = shared_curves(contents.trainings)
    assert findings(shared) == [
        "sit-ti-2 on tiny-kl (seed0): 6.00 after 80 images.", "sit-ti-2 on tiny-kl (seed1): 5.00 after 80 images."
    ]  # fmt: skip
    assert headline(contents, [shared]).sentence == findings(shared)[0]


def test_the_shared_chart_is_drawn_above_the_runs(page, write_training):
    folders = [write_training("base"), write_training("eq", [7.0, 5.0, 4.0], autoencoder="tiny-kl-eq")]
    text = page(*folders)
    assert text.index("<h2>Learning curves</h2>") < text.index("<h2>Training: sit-ti-2 on tiny-kl</h2>")
    assert "<h1>sit-ti-2 on tiny-kl → sit-ti-2 on tiny-kl-eq</h1>" in text
    (svg,) = re.findall(r'<svg [^>]*aria-hidden="true">(?:(?!</svg>).)*id="learning-1-.*?</svg>', text, re.DOTALL)
    ElementTree.fromstring(svg)
    assert "var(--base" in svg
    assert "var(--accent" in svg
    assert "images seen in training" in svg
    assert "fill: #ffffff" not in svg
    assert "Learning curves" not in page(folders[0])


# Sample sets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({}, {"Sampler": "sde", "Steps": "250", "Seed": "3", "Samples": "5,000"}),
        ({"recipe": "dit-ti-2", "guidance_scale": 1.5}, {"Sampler": "ddpm", "Steps": "250", "Guidance scale": "1.5"}),
        ({"recipe": "dit-b-2", "sampler": "ddim", "ddim_eta": 0.5}, {"Sampler": "ddim", "Steps": "250", "Eta": "0.5"}),
        (
            {"recipe": "maskgit-ti", "num_steps": 8, "guidance_scale": 3.0, "guidance_schedule": "linear"},
            {"Sampler": "confidence", "Steps": "8", "Guidance scale": "3", "Guidance schedule": "linear"},
        ),
        (
            {"sampler": "dopri5", "rtol": 1e-3, "guidance_scale": 2.0, "guidance_high": 0.7, "guidance_channels": 3},
            {
                "Sampler": "dopri5",
                "Relative tolerance": "0.001",
                "Guidance scale": "2",
                "Guided up to noise": "0.7",
                "Guided channels": "3",
            },
        ),
        (
            {"guidance_scale": 2.0, "weak_run": "runs/weak", "sigma_rel": 0.1},
            {"Guidance scale": "2", "Guided away from": "runs/weak", "Averaging horizon": "0.1"},
        ),
    ],
)
def test_how_samples_were_drawn_is_said(write_samples, fields, facts):
    (samples,) = read_folders([write_samples("drawn", **fields)]).sample_sets
    assert samples.name == "drawn"
    found = drawing_facts(samples)
    assert found["Generator"].endswith(" on tiny-kl after 4,000 steps")
    assert facts.items() <= found.items()


def test_samples_alone_make_a_page(page, write_samples):
    text = page(write_samples("drawn"))
    assert "<h1>drawn</h1>" in text
    assert "Generator sit-ti-2 on tiny-kl after 4,000 steps, sampler sde, samples 5,000, steps 250," in text
    assert text.count("<img ") == 1


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_are_rows_named_after_their_samples(write_score):
    contents = read_folders(
        [
            write_score("a", samples="runs/base/samples.npz", fid=45.0, sfid=9.0, inception_score=20.0,
                        inception_score_std=0.5, precision=0.5, recall=0.4),
            write_score("b", samples="runs/eq", fid=36.0, sfid=9.5, precision=0.6, recall=0.4),
            write_score("c", samples="elsewhere/adm.npz", fid=40.0, kid=0.0123, kid_std=0.0004),
        ]
    )  # fmt: skip
    ((_, table),) = score_tables(contents.scores)
    assert [metric.label for metric in table.metrics] == [
        "FID", "sFID", "Inception Score", "KID", "Precision", "Recall", "Samples"
    ]  # fmt: skip
    cells = cells_of(table)
    assert list(cells) == ["base", "eq", "adm"]
    assert (cells["eq"]["FID"].text, cells["eq"]["FID"].change, cells["eq"]["FID"].is_best) == ("36.00", "−20%", True)  # noqa: RUF001
    assert (cells["eq"]["sFID"].improves, cells["base"]["sFID"].is_best) == (False, True)
    assert cells["base"]["Inception Score"].text == "20.00 ± 0.50"
    assert cells["adm"]["KID"].text == "0.0123 ± 0.0004"
    assert cells["adm"]["Recall"].text == "–"  # noqa: RUF001
    assert not any(cell.is_best for cell in (cells["eq"]["Recall"], cells["base"]["Recall"], cells["adm"]["KID"]))


def test_other_features_have_columns_of_their_own(page, write_score):
    folders = [
        write_score("a", samples="runs/one", fid=45.0, precision=0.5),
        write_score("b", samples="runs/two", features="efficientnet-lite0", precision_efficientnet_lite0=0.75,
                    **{LITE: 98.6, "kd_efficientnet_lite0": 0.00025, "kd_std_efficientnet_lite0": 0.0011}),
    ]  # fmt: skip
    ((_, table),) = score_tables(read_folders(folders).scores)
    lite = [f"{name} (efficientnet-lite0)" for name in ("FD", "KD", "Precision")]
    assert [metric.label for metric in table.metrics] == ["FID", "Precision", *lite, "Samples"]
    assert cells_of(table)["two"]["KD (efficientnet-lite0)"].text == "0.00025 ± 0.00110"
    assert not any(cell.is_best for _, cells in table.rows for cell in cells)
    assert "Figures by different features have" in page(*folders)
    ((_, alone),) = score_tables(read_folders(folders[1:]).scores)
    assert [metric.label for metric in alone.metrics] == [lite[0], "KD", "Precision", "Samples"]


def test_other_references_have_tables_of_their_own(page, write_score):
    folders = [
        write_score("a", samples="runs/one", fid=45.0),
        write_score("b", samples="runs/two", fid=10.0, reference="data/train.parquet"),
    ]
    tables = score_tables(read_folders(folders).scores)
    assert not any(cell.is_best or cell.change for _, table in tables for _, cells in table.rows for cell in cells)
    text = page(*folders)
    assert "Against test.parquet</h3>" in text
    assert "Against train.parquet</h3>" in text
    assert text.count("10,000 images of") == 2
    assert "Measured under different conditions: no change is computed." in text


def test_other_numbers_of_samples_are_not_judged(page, write_score):
    folders = [
        write_score("a", samples="runs/one", fid=45.0),
        write_score("b", samples="runs/two", fid=30.0, num_samples=50_000),
        write_score("c", samples="runs/three", fid=28.0, num_samples=50_000),
    ]
    ((_, table),) = score_tables(read_folders(folders).scores)
    one, two, three = (cells_of(table)[name]["FID"] for name in ("one", "two", "three"))
    assert (one.change, two.change, three.change) == ("", "", "−7%")  # noqa: RUF001
    assert (one.is_best, two.is_best, three.is_best) == (False, False, True)
    assert "the Fréchet distance falls as this number grows" in page(*folders)


def test_the_headline_of_scores(page, write_score):
    base = write_score("a", samples="runs/base", fid=45.0, precision=0.5)
    text = page(base)
    assert "<h1>base</h1>" in text
    assert "FID 45.00, precision 0.500." in text
    text = page(base, write_score("b", samples="runs/eq", fid=36.0, precision=0.55))
    assert "<h1>base → eq</h1>" in text
    assert "FID −20%, precision +0.050."  # noqa: RUF001 in text


# Everything together --------------------------------------------------------------------------------------------------


@pytest.fixture
def everything(write_training, write_samples, write_score):
    """Two training runs, a sample set and two scores."""
    return [
        write_training("base"),
        write_training("eq", [7.0, 5.0, 4.0], autoencoder="tiny-kl-eq"),
        write_samples("drawn", cell_px=16),
        write_score("a", samples="runs/base/samples.npz", fid=45.0),
        write_score("b", samples="runs/eq/samples.npz", fid=36.0),
    ]


def test_nothing_is_loaded_from_elsewhere_and_headings_do_not_skip_a_level(page, everything, two_evaluations):
    for folders in (everything, [*two_evaluations, *everything]):
        text = page(*folders)
        sources = re.findall(r'\bsrc="([^"]*)"', text)
        assert len(sources) >= 2 * 3 + 1
        assert all(source.startswith("data:image/") for source in sources)
        assert re.findall(r"url\((?!#)", text) == []
        levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
        assert all(after - before <= 1 for before, after in pairwise(levels))
        identifiers = re.findall(r'\bid="([^"]+)"', text)
        assert len(identifiers) == len(set(identifiers))
    assert "Rotation error −47%" in text  # noqa: RUF001
    assert "Equivariance report" in text


def test_every_folder_has_its_record(page, everything):
    titles = re.findall(r"<summary>(.*?)</summary>", page(*everything))
    assert titles == [
        "Training run: sit-ti-2 on tiny-kl", "Training run: sit-ti-2 on tiny-kl-eq", "Samples: drawn",
        "Score of base", "Score of eq",
    ]  # fmt: skip


def test_charts_and_sheets_get_files(tmp_path, everything):
    written = write_figures(everything, tmp_path / "figures")
    assert [path.name for path in written if path.suffix in (".png", ".svg")] == [
        "stages_sit-ti-2_on_tiny-kl.png", "stages_sit-ti-2_on_tiny-kl-eq.png", "samples_drawn.png",
        "learning_curves.svg", "training_sit-ti-2_on_tiny-kl.svg", "training_sit-ti-2_on_tiny-kl-eq.svg",
    ]  # fmt: skip
    curves = (tmp_path / "figures" / "learning_curves.csv").read_text().splitlines()
    assert curves[0] == "arm,seed,images,training_sec,fd_efficientnet_lite0"
    for path in written:
        if path.suffix == ".svg":
            ElementTree.parse(path)
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) >= 60


@pytest.mark.parametrize(
    ("make", "file"),
    [("write_samples", "samples.png"), ("write_samples", "metrics.json"), ("write_score", "metrics.json")],
)
def test_unfinished_samples_and_scores_are_one_line(page, request, make, file):
    folder = request.getfixturevalue(make)("unfinished")
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"no {re.escape(file)}"):
        page(folder)


def test_a_folder_of_another_kind_is_told_what_is_drawn(page, tmp_path):
    write_json(tmp_path / "cache" / "config.json", {"command": "encode"})
    with pytest.raises(UserError, match="written by 'eqvae encode'") as caught:
        page(tmp_path / "cache")
    for command in ("evaluate", "finetune", "train", "sample", "score"):
        assert command in str(caught.value)


def test_sparse_folders_are_drawn_too(page, write_training, write_samples, write_score):
    """Older versions wrote less; what is not known is left out."""
    training, samples, score = write_training("run"), write_samples("drawn"), write_score("score", fid=3.0)
    write_json(training / "config.json", {"command": "train"})
    write_json(training / "generator" / "generator.json", {})
    write_json(samples / "config.json", {"command": "sample"})
    write_json(score / "config.json", {"command": "score"})
    write_json(score / "metrics.json", {"fid": 3.0})
    assert read_json(samples / "metrics.json")["num_samples"] == 5000
    text = page(training, samples, score)
    assert "3.00" in text


# What the commands really write ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "autoencoder", "losses", "sampler"),
    [("dit-ti-2", "untrained:tiny-kl", ["Squared error", "Variational bound"], "ddpm"),
     ("maskgit-ti", "untrained:tiny-vq", ["Cross-entropy"], "confidence")],
)  # fmt: skip
def test_every_kind_of_generator_from_training_to_its_score(
    tmp_path, monkeypatch, recipe, autoencoder, losses, sampler
):
    monkeypatch.setattr(generator_run, "matrix_peak_flops_per_sec", lambda device, precision: 1e12)
    random = np.random.default_rng(0)
    for index in range(8):
        path = tmp_path / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(path)
    data, cache, trained, drawn, score = (f"{tmp_path / name}" for name in ("data", "cache", "run", "drawn", "score"))
    measure, cpu = ["--reference", data, "--features", "efficientnet-lite0"], ["--device", "cpu"]
    encoding = ["--image-size", "32", "--batch-size", "8", "--num-workers", "0", *cpu]
    training = [
        "--max-steps", "2", "--batch-size", "4", "--log-every", "1", "--sample-every", "2", "--watch-steps", "2",
        "--num-watch-samples", "8", "--precision", "fp32", *measure, *cpu,
    ]  # fmt: skip
    sampling = ["--num-samples", "6", "--num-steps", "3", "--precision", "fp32", *cpu]
    for command in (
        ["encode", autoencoder, "--data", data, "--out", cache, *encoding],
        ["train", recipe, "--latents", cache, "--out", trained, *training],
        ["sample", trained, "--out", drawn, *sampling],
        ["score", drawn, "--out", score, "--num-workers", "0", *measure, *cpu],
        ["report", trained, drawn, score, "--out", f"{tmp_path / 'page.html'}", "--figures", f"{tmp_path / 'figures'}"],
    ):
        assert run(command) == 0, command
    panels = [panel.title for panel in training_panels(training_of(tmp_path / "run"))]
    assert panels[:-2] == ["FD (efficientnet-lite0) ↓", "Loss", *losses]
    assert panels[-2:] == ["Gradient norm", "Pace"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img ") == 2
    assert f"<h2>Training: {recipe} on {autoencoder}</h2>" in text
    assert f"{sampler}</dd>" in text
    assert "<h1>drawn</h1>" in text
    assert sorted(path.suffix for path in (tmp_path / "figures").iterdir()) == [".csv", ".pdf", ".png", ".png", ".svg"]
