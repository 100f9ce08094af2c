"""One card for each autoencoder, and the page around it."""

import re

import pytest

from eqvae.artifacts.files import write_json
from eqvae.artifacts.names import PICTURES
from eqvae.drawing import read_folders, write_report
from eqvae.drawing.evaluation_charts import distance_charts, spectrum_charts
from eqvae.drawing.page import cards


@pytest.fixture
def page(tmp_path):
    def write(*folders):
        out = tmp_path / "report.html"
        write_report(folders, out)
        return out.read_text(encoding="utf-8")

    return write


def cards_of(*folders):
    evaluations = read_folders(folders)[0]
    return cards(evaluations, distance_charts(evaluations), spectrum_charts(evaluations))


def test_a_card_tells_it_all(full_evaluations):
    found = cards_of(*full_evaluations)
    base, finetuned = found
    assert [card.name for card in found] == ["base", "finetuned"]
    assert base.detail == "4 channels, 4 × 4 cells for 32 px"  # noqa: RUF001
    assert [(label, text) for label, _, text in finetuned.figures] == [
        ("rFID", "0.82"),
        ("PSNR", "25.70 dB"),
        ("Rotation error", "0.477"),
        ("Scale error", "0.384"),
        ("Intrinsic dimension", "39.4 ± 0.3"),
        ("iFID", "13.80"),
    ]
    assert base.pictures is not None
    ((image, decoded, latent_map),) = base.pictures.rows
    assert [image.formula, decoded.formula, latent_map.formula] == ["x", "D(E(x))", "PCA of E(x)"]
    assert (len(base.distances), len(base.spectra)) == (1, 1)
    assert base.color != finetuned.color


def test_two_autoencoders_are_set_side_by_side(page, full_evaluations):
    text = page(*full_evaluations)
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert headings[:3] == ["Side by side", "The figures", "Figure 3 and spectra"]
    assert text.count('class="card"') == 2
    assert "What predicts a generator</h3>" in text
    labels = re.findall(r'aria-label="(rFID after each transformation: [^"]*)"', text)
    assert len(labels) == 3, "one for each card, one for both"
    assert labels[2].startswith("rFID after each transformation: s = 0.75: base 52, finetuned 12;")
    assert "rFID between τ(x) and D(τ(E(x)))" in text, "the exact figures fold away"
    assert text.count("rounded down") == 1, "explained once"
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


def test_one_autoencoder_has_a_card_and_no_figure_twice(page, full_evaluations):
    text = page(full_evaluations[0])
    assert "At a glance</h2>" in text
    assert "Figure 3 and spectra" not in text
    assert text.count("rFID after each transformation: ") == 1
    assert text.count("rounded down") == 1
    assert "52, 83, 107 and 64" in text


def test_without_all_there_is_no_card(page, two_evaluations):
    assert cards_of(*two_evaluations) == []
    text = page(*two_evaluations)
    assert "Side by side" not in text
    assert "What predicts a generator" not in text
    assert 'class="card' not in text


def test_only_the_autoencoder_with_all_gets_a_card(page, two_evaluations, full_evaluations, write_evaluation):
    plain = write_evaluation("plain", psnr_db=20.0)
    text = page(plain, full_evaluations[1])
    assert text.count('class="card"') == 1
    assert text.count("rounded down") == 1


def test_a_card_without_pictures_keeps_the_rest(page, full_evaluations):
    (full_evaluations[0] / PICTURES).unlink()
    assert cards_of(full_evaluations[0])[0].pictures is None
    assert 'class="card-figures"' in page(full_evaluations[0])


def test_other_features_are_named_and_not_set_beside_published_figures(page, write_evaluation, frechet_distances):
    figures = frechet_distances(*[1.0] * 7, r=0.034, i=1.21, features="fd_efficientnet_lite0")
    folder = write_evaluation("a", config={"features": "efficientnet-lite0"}, **figures)
    (card,) = cards_of(folder)
    assert card.detail == "efficientnet-lite0 features"
    assert [label for label, _, _ in card.figures] == ["rFD", "iFD"]
    text = page(folder)
    assert "are no FIDs" in text
    assert "52, 83, 107 and 64" not in text


def test_different_features_are_said_but_the_rest_is_compared(page, write_evaluation):
    text = page(
        write_evaluation("a", rfid=0.9, psnr_db=20.0),
        write_evaluation("b", config={"features": "efficientnet-lite0"}, rfd_efficientnet_lite0=0.1, psnr_db=21.0),
    )
    assert "distances by different features cannot be compared" in text
    assert "+1.00 dB" in text


def test_cards_say_what_was_measured_on_where_that_differs(page, full_evaluations, write_evaluation):
    other = write_evaluation("other", config={"data": "elsewhere"}, **{"rfid_scale_0.5": 2.0})
    assert [card.detail for card in cards_of(full_evaluations[0], other)] == [
        "4 channels, 4 × 4 cells for 32 px; 2 images of photos, 32 px",  # noqa: RUF001
        "2 images of elsewhere, 32 px",
    ]
    assert "Figure 3</h2>" not in page(full_evaluations[0], other)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3)])
def test_rows_of_cards_are_full(page, write_evaluation, count, columns):
    folders = [write_evaluation(str(index), **{"rfid_scale_0.5": 2.0}) for index in range(count)]
    assert f'style="--columns: {columns}"' in page(*folders)


def test_precision_is_a_condition_and_its_default_is_fp32(page, write_evaluation):
    old = write_evaluation("old", psnr_db=20.0)
    same = write_evaluation("same", config={"precision": "fp32", "features": "inception", "all": False}, psnr_db=21.0)
    other = write_evaluation("other", config={"precision": "bf16"}, psnr_db=21.0)
    assert "PSNR +1.00 dB" in page(old, same)
    text = page(old, other)
    assert "no change is computed" in text
    assert "other on 2 images of photos, 32 px, bf16" in text


def test_names_on_cards_are_escaped(page, write_evaluation, spectrum):
    folder = write_evaluation("a", config={"autoencoder": '"><b>&'}, **{"rfid_scale_0.5": 2.0})
    write_json(folder / "spectrum.json", spectrum(1.0))
    assert '"><b>' not in page(folder)
