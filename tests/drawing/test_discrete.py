"""Discrete autoencoders on the page: tokens that turn with the image, and how the codebook is used."""

import json
import re

import pytest

from eqvae.artifacts.files import read_json, write_json
from eqvae.artifacts.names import JOURNAL
from eqvae.drawing import read_folders, write_report
from eqvae.drawing.evaluation_charts import distance_charts, spectrum_charts
from eqvae.drawing.page import cards
from eqvae.drawing.panels import run_panels
from eqvae.drawing.tables import card_columns, figure_table, main_columns
from eqvae.runs.evaluate import EvaluateConfig, evaluate

LABELS = ["Tokens kept, rotation", "Tokens kept, scale", "Codes used", "Codebook perplexity"]
BASE = {"token_agreement_rotation": 0.21, "token_agreement_scale": 0.4, "codebook_usage": 0.5,
        "codebook_perplexity": 310.4}  # fmt: skip
FINETUNED = {"token_agreement_rotation": 0.48, "token_agreement_scale": 0.52, "codebook_usage": 0.4375,
             "codebook_perplexity": 322.0}  # fmt: skip


def labels_and_cells(*folders):
    evaluations = read_folders(folders)[0]
    table = figure_table(evaluations, main_columns(evaluations))
    return [metric.label for metric in table.metrics], [cells for _, cells in table.rows]


def test_more_is_better_of_tokens_and_codes(write_evaluation):
    labels, (base, finetuned) = labels_and_cells(write_evaluation("a", **BASE), write_evaluation("b", **FINETUNED))
    assert labels == LABELS
    assert [cell.text for cell in base] == ["0.210", "0.400", "0.500", "310"]
    assert [cell.change for cell in finetuned] == ["+0.270", "+0.120", "−0.062", "+12"]  # noqa: RUF001
    assert [cell.improves for cell in finetuned] == [True, True, False, True]
    assert [cell.is_best for cell in finetuned] == [True, True, False, True]


def test_continuous_autoencoders_beside_them_have_dashes(write_evaluation):
    labels, (_, continuous) = labels_and_cells(write_evaluation("a", **BASE), write_evaluation("b", psnr_db=20.0))
    assert labels == ["PSNR", *LABELS]
    assert [cell.text for cell in continuous] == ["20.00"] + ["–"] * 4  # noqa: RUF001


def test_cards_say_it_of_discrete_autoencoders_only(full_evaluations):
    continuous, discrete = full_evaluations
    without = [metric.label for metric in card_columns(read_folders(full_evaluations)[0])]
    assert not set(LABELS) & set(without)
    write_json(discrete / "metrics.json", read_json(discrete / "metrics.json") | FINETUNED)
    evaluations = read_folders([continuous, discrete])[0]
    first, second = cards(evaluations, distance_charts(evaluations), spectrum_charts(evaluations))
    assert [label for label, _, _ in first.figures] == without
    assert [label for label, _, _ in second.figures] == [*without, *LABELS[:2]]
    assert [text for _, _, text in second.figures][-2:] == ["0.480", "0.520"]


def test_a_runs_validations_become_curves(run_folder):
    records = [
        {"kind": "validation", "step": step, "psnr_db": 20.0, **figures}
        for step, figures in ((0, BASE), (40, FINETUNED))
    ]
    (run_folder / JOURNAL).write_text("".join(json.dumps(record) + "\n" for record in records))
    (run,) = read_folders([run_folder])[1]
    (validation,) = run_panels(run).values()
    shown = {panel.title: (panel.summary, panel.y_label) for panel in validation}
    assert list(shown) == ["PSNR ↑", *(f"{label} ↑" for label in LABELS)]
    assert shown["Codes used ↑"] == ("0.500 → 0.438", "Codes used")
    assert shown["Codebook perplexity ↑"] == ("310 → 322", "Codebook perplexity")


@pytest.mark.parametrize("is_discrete", [False, True])
def test_what_an_evaluation_measured_stands_on_the_page(
    tmp_path, small_autoencoder, small_discrete_autoencoder, photographs, is_discrete
):
    autoencoder = small_discrete_autoencoder if is_discrete else small_autoencoder
    config = EvaluateConfig(
        autoencoder=autoencoder.name, data=str(photographs), out=tmp_path / "evaluation", image_size=64, lpips=False,
        features="efficientnet-lite0", num_images=3, num_workers=0, device="cpu",
    )  # fmt: skip
    figures = evaluate(config, autoencoder)
    out = tmp_path / "report.html"
    write_report([config.out], out)
    heads = re.findall(r'<th scope="col">([^<&]*)', out.read_text(encoding="utf-8"))
    assert [head for head in heads if head in LABELS] == (LABELS if is_discrete else [])
    if is_discrete:
        shown = re.findall(r"<td>(?:<strong>)?([0-9.]+)", out.read_text(encoding="utf-8"))
        assert f"{figures['codebook_usage']:.3f}" in shown
        assert f"{figures['token_agreement_rotation']:.3f}" in shown
