"""Figures as files of their own."""

import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from eqvae.artifacts.files import write_json
from eqvae.drawing import read_folders, write_figures
from eqvae.drawing.charts import in_legend
from eqvae.drawing.figures import _distinct
from eqvae.drawing.pictures import Sheet, read_sheet
from eqvae.sampling.draw import contact_sheet


def test_every_figure_gets_a_file(tmp_path, two_evaluations, run_folder):
    written = write_figures([*two_evaluations, run_folder], tmp_path / "figures")
    assert sorted(path.name for path in written) == [
        "90_degrees.png", "curves_run.csv", "curves_run.pdf", "curves_run.svg", "latent_maps.png", "s_0.5.png"
    ]  # fmt: skip
    assert all(path.stat().st_size > 0 for path in written)


def test_every_chart_is_there_for_papers_with_its_data(tmp_path, full_evaluations, run_folder):
    written = write_figures([*full_evaluations, run_folder], tmp_path / "figures")
    charts = ("figure3", "spectrum", "curves_run")
    wanted = {f"{name}.{ending}" for name in charts for ending in ("svg", "pdf", "csv")}
    assert wanted == {path.name for path in written if path.suffix != ".png"}
    bars = pandas.read_csv(tmp_path / "figures" / "figure3.csv")
    found = bars.set_index(["transform", "autoencoder"])["rfid"]
    assert found["s = 0.25", "base"] == 107.9
    assert found["R(θ)", "finetuned"] == 3.41
    assert len(bars) == 2 * 4
    spectra = pandas.read_csv(tmp_path / "figures" / "spectrum.csv")
    base = spectra[spectra["autoencoder"] == "base"]
    slope = np.polyfit(np.log10(base["cycles_per_cell"]), base["latent_db"], 1)[0]
    assert slope == pytest.approx(-10.0), "power falls as 1/f"
    curves = pandas.read_csv(tmp_path / "figures" / "curves_run.csv")
    plain = curves[(curves["panel"] == "Reconstruction") & (curves["branch"] == "plain branch")]
    assert plain["step"].tolist() == list(range(2, 41, 2))
    assert plain["value"].iloc[-1] == 77.0
    pdf = (tmp_path / "figures" / "figure3.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Type3" not in pdf


def test_the_same_charts_make_the_same_files(tmp_path, full_evaluations, run_folder):
    first, again = (write_figures([*full_evaluations, run_folder], tmp_path / name) for name in ("first", "again"))
    assert [path.name for path in first] == [path.name for path in again]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    svg = (tmp_path / "first" / "curves_run.svg").read_text()
    assert "<dc:date>" not in svg
    assert "<!-- equivariance branch -->" in svg, "the legend says which is which"


def test_figure_3_and_the_spectra_get_files(tmp_path, full_evaluations, write_evaluation):
    written = write_figures(full_evaluations, tmp_path / "figures")
    charts = [path for path in written if path.suffix == ".svg"]
    assert [path.name for path in charts] == ["figure3.svg", "spectrum.svg"]
    for path in charts:
        ElementTree.parse(path)
        assert "<!-- finetuned -->" in path.read_text(), "letters are outlines: no font is needed"
    other = write_evaluation("other", config={"data": "elsewhere"}, **{"rfid_scale_0.5": 2.0})
    names = [path.name for path in write_figures([*full_evaluations, other], tmp_path / "more")]
    assert [name for name in names if name.endswith(".svg")] == ["figure3_1.svg", "figure3_2.svg", "spectrum.svg"]


def test_a_run_that_has_not_logged_anything_has_no_curves(tmp_path):
    write_json(tmp_path / "unstarted" / "config.json", {"command": "finetune", "autoencoder": "base"})
    assert write_figures([tmp_path / "unstarted"], tmp_path / "figures") == []


def test_runs_whose_folders_have_one_name_are_told_apart(tmp_path, run_folder):
    folders = [shutil.copytree(run_folder, tmp_path / above / "run") for above in ("a", "b")]
    assert [run.name for run in read_folders(folders)[1]] == ["run (a)", "run (b)"]
    written = write_figures(folders, tmp_path / "figures")
    assert [path.stem for path in written] == ["curves_run_a"] * 3 + ["curves_run_b"] * 3
    deeper = shutil.copytree(run_folder, tmp_path / "c" / "a" / "run")
    assert len({path.name for path in write_figures([*folders, deeper], tmp_path / "figures")}) == 9


def test_lines_of_a_journal_that_are_no_records_are_left_out(tmp_path, run_folder):
    (run,) = read_folders([run_folder])[1]
    with (run_folder / "journal.jsonl").open("a") as journal:
        journal.write('\n3\n"text"\n[1]\nnull\n{"kind": "train", "step": null}\n')
    (again,) = read_folders([run_folder])[1]
    assert again.records("train") == run.records("train")
    assert len(write_figures([run_folder], tmp_path / "figures")) == 3


def test_names_that_fold_to_one_make_two_files():
    taken = Counter[str]()
    assert [_distinct(name, taken) for name in ("stages_a", "stages_A", "stages_b", "stages_a")] == [
        "stages_a", "stages_A_2", "stages_b", "stages_a_3"
    ]  # fmt: skip


def test_a_legend_shows_names_as_they_are():
    axes = Figure().add_subplot()
    for name in ("_a", r"b$\frac$"):
        axes.plot([0, 1], [0, 1], label=in_legend(name))
    labels = [text.get_text() for text in axes.legend().get_texts()]
    assert labels == ["\u200b_a", r"b\$\frac\$"]
    axes.figure.canvas.draw()


@pytest.mark.parametrize("size_px", [16, 32, 64, 256])
def test_a_cropped_sheet_keeps_the_names_of_its_rows(tmp_path, size_px):
    images = torch.zeros(100, 3, size_px, size_px, dtype=torch.uint8)
    names = [f"golden retriever {row}" for row in range(10)]
    contact_sheet(images, tmp_path / "sheet.png", row_names=names)
    whole = np.array(Image.open(tmp_path / "sheet.png").convert("RGB"))
    strip = whole[:, 10 * (size_px + 2) + 2 :]
    cropped = np.array(read_sheet(Sheet(label="", path=tmp_path / "sheet.png", cell_px=size_px)))
    factor = max(round(340 / (cropped.shape[1])), 1)
    shown = cropped[::factor, ::factor]
    rows = min(len(shown), len(strip))
    assert np.array_equal(shown[:rows, -strip.shape[1] :], strip[:rows])
