"""Power spectra of latents, read and drawn."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from eqvae.artifacts.files import write_json
from eqvae.artifacts.names import SPECTRUM
from eqvae.drawing.evaluation_charts import charts_of_one, draw_spectra, spectrum_charts, spectrum_figure
from eqvae.drawing.folders import Spectrum, read_folders
from eqvae.errors import UserError


def charts(*folders):
    return spectrum_charts(read_folders(folders)[0])


def test_white_noise_is_at_0_db(tmp_path):
    power = {"frequency": [0.1, 0.2, 0.4], "latent_power": [1.0, 1.0, 1.0], "image_power": [100.0, 1.0, 0.1]}
    write_json(tmp_path / SPECTRUM, power)
    spectrum = Spectrum.read(tmp_path / SPECTRUM)
    np.testing.assert_array_equal(spectrum.latent_db, 0.0)
    np.testing.assert_allclose(spectrum.image_db, [20.0, 0.0, -10.0], atol=1e-12)


def test_frequencies_without_power_are_left_out(tmp_path):
    power = {"frequency": [0.1, 0.2, 0.4], "latent_power": [1.0, 0.0, 2.0], "image_power": [2.0, 1.0, 1.0]}
    write_json(tmp_path / SPECTRUM, power)
    assert Spectrum.read(tmp_path / SPECTRUM).frequency.tolist() == [0.1, 0.4]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"frequency": [0.5], "latent_power": [1.0]},
        {"frequency": [0.25, 0.5], "latent_power": [1.0], "image_power": [1.0, 1.0]},
        {"frequency": ["low"], "latent_power": [1.0], "image_power": [1.0]},
        {"frequency": 0.5, "latent_power": 1.0, "image_power": 1.0},
        {"frequency": [], "latent_power": [], "image_power": []},
        {"frequency": [0.5], "latent_power": [float("nan")], "image_power": [1.0]},
        {"frequency": [0.5], "latent_power": [None], "image_power": [1.0]},
        {"frequency": [0.5], "latent_power": [-1.0], "image_power": [1.0]},
        {"frequency": [[0.5]], "latent_power": [[1.0]], "image_power": [[1.0]]},
    ],
)
def test_anything_else_is_one_line(tmp_path, content):
    (tmp_path / SPECTRUM).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"spectrum\.json' (holds no power spectrum|is no readable JSON)"):
        Spectrum.read(tmp_path / SPECTRUM)


def test_lines_stand_beside_one_dashed_image(full_evaluations):
    (chart,) = charts(*full_evaluations)
    assert chart.shares_image_spectrum
    assert chart.excess == "excess 7.3 → −2.1 dB"  # noqa: RUF001
    svg = draw_spectra(chart, "spectrum")
    ElementTree.fromstring(svg)
    assert svg.count("stroke-dasharray") == 1
    assert "var(--accent" in svg
    assert ">cycles per latent cell</text>" in svg
    legend = [text.get_text() for text in spectrum_figure(chart).legends[0].get_texts()]
    assert legend == ["base", "finetuned", "image"]


def test_a_card_keeps_the_common_scale(full_evaluations):
    (chart,) = charts(*full_evaluations)
    (alone,) = charts_of_one([chart], "finetuned")
    assert alone.range_db == chart.range_db
    assert alone.excess == "excess −2.1 dB"  # noqa: RUF001
    ElementTree.fromstring(draw_spectra(alone, "card", small=True))


def test_images_on_other_cells_get_lines_of_their_own(write_evaluation, spectrum):
    folders = [write_evaluation(name, psnr_db=20.0) for name in ("coarse", "fine")]
    for folder, num_rings in zip(folders, (8, 16), strict=True):
        write_json(folder / SPECTRUM, spectrum(1.0, num_rings))
    (chart,) = charts(*folders)
    assert not chart.shares_image_spectrum
    assert chart.excess == ""
    assert draw_spectra(chart, "spectrum").count("stroke-dasharray") == 2


def test_a_spectrum_from_before_is_not_shown(write_evaluation, spectrum):
    folder = write_evaluation("a", config={"all": False}, psnr_db=20.0)
    write_json(folder / SPECTRUM, spectrum(1.0))
    assert charts(folder) == []


def test_other_conditions_get_a_chart_of_their_own(write_evaluation, spectrum):
    folders = [write_evaluation("a", psnr_db=20.0), write_evaluation("b", config={"image_size": 64}, psnr_db=20.0)]
    for folder in folders:
        write_json(folder / SPECTRUM, spectrum(1.0))
    assert [len(chart.entries) for chart in charts(*folders)] == [1, 1]
