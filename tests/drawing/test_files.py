"""Figures as files of their own."""

import shutil
import xml.etree.ElementTree as ElementTree

from eqvae.artifacts.files import write_json
from eqvae.drawing import read_folders, write_figures


def test_every_figure_gets_a_file(tmp_path, two_evaluations, run_folder):
    written = write_figures([*two_evaluations, run_folder], tmp_path / "figures")
    assert sorted(path.name for path in written) == ["90_degrees.png", "curves_run.svg", "latent_maps.png", "s_0.5.png"]
    assert all(path.stat().st_size > 0 for path in written)


def test_figure_3_and_the_spectra_get_files(tmp_path, full_evaluations, write_evaluation):
    written = write_figures(full_evaluations, tmp_path / "figures")
    charts = [path for path in written if path.suffix == ".svg"]
    assert [path.name for path in charts] == ["figure3.svg", "spectrum.svg"]
    for path in charts:
        ElementTree.parse(path)
        assert "<!-- finetuned -->" in path.read_text(), "letters are outlines: no font is needed"
    other = write_evaluation("other", config={"data": "elsewhere"}, **{"rfid_scale_0.5": 2.0})
    names = [path.name for path in write_figures([*full_evaluations, other], tmp_path / "more")]
    assert names[-3:] == ["figure3_1.svg", "figure3_2.svg", "spectrum.svg"]


def test_a_run_that_has_not_logged_anything_has_no_curves(tmp_path):
    write_json(tmp_path / "unstarted" / "config.json", {"command": "finetune", "autoencoder": "base"})
    assert write_figures([tmp_path / "unstarted"], tmp_path / "figures") == []


def test_runs_whose_folders_have_one_name_are_told_apart(tmp_path, run_folder):
    folders = [shutil.copytree(run_folder, tmp_path / above / "run") for above in ("a", "b")]
    assert [run.name for run in read_folders(folders)[1]] == ["run (a)", "run (b)"]
    written = write_figures(folders, tmp_path / "figures")
    assert [path.name for path in written] == ["curves_run_a.svg", "curves_run_b.svg"]
    deeper = shutil.copytree(run_folder, tmp_path / "c" / "a" / "run")
    assert len({path.name for path in write_figures([*folders, deeper], tmp_path / "figures")}) == 3


def test_lines_of_a_journal_that_are_no_records_are_left_out(tmp_path, run_folder):
    (run,) = read_folders([run_folder])[1]
    with (run_folder / "journal.jsonl").open("a") as journal:
        journal.write('\n3\n"text"\n[1]\nnull\n{"kind": "train", "step": null}\n')
    (again,) = read_folders([run_folder])[1]
    assert again.records("train") == run.records("train")
    assert len(write_figures([run_folder], tmp_path / "figures")) == 1
