"""Curves of a fine-tuning run."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from eqvae.drawing.charts import ACCENT, BASE
from eqvae.drawing.folders import read_folders
from eqvae.drawing.panels import MAX_POINTS, Panel, Series, draw_panel, draw_panels, run_panels, smooth


@pytest.fixture
def groups(run_folder):
    return {title: {panel.title: panel for panel in panels} for title, panels in run_panels(read(run_folder)).items()}


def read(folder):
    return read_folders([folder])[1][0]


def test_only_what_was_logged_is_drawn(groups):
    assert list(groups) == ["Validation", "Losses", "Discriminator", "Optimization"]
    assert list(groups["Losses"]) == ["Reconstruction", "L1 of pixels"], "the explicit loss is always 0"
    assert list(groups["Discriminator"]) == ["Discriminator loss"]


def test_validation_has_the_base_as_reference(groups):
    panel = groups["Validation"]["Rotation error ↓"]
    assert panel.base == 0.9
    assert panel.summary == "0.900 → 0.477"
    assert groups["Validation"]["PSNR ↑"].y_label == "dB"


def test_branches_are_drawn_apart_and_the_later_of_two_records_counts(groups):
    plain, equivariance = groups["Losses"]["Reconstruction"].series
    assert (plain.color, equivariance.color) == (BASE, ACCENT)
    assert equivariance.steps.tolist() == list(range(1, 41, 2))
    assert plain.values[-1] == 77.0


def test_charts_are_well_formed_and_take_the_pages_colours(groups):
    svg = draw_panel(groups["Validation"]["Rotation error ↓"], "chart-1")
    ElementTree.fromstring(svg)
    assert "var(--accent" in svg
    assert "var(--base" in svg
    assert ">optimizer steps</text>" in svg
    assert 'id="chart-1-' in svg


def test_values_that_are_no_numbers_are_left_out(run_folder):
    with (run_folder / "journal.jsonl").open("a") as journal:
        journal.write('\n{"kind": "train", "step": 50, "reconstruction": NaN, "l1": null, "branch": "equivariance"}\n')
    panels = {panel.title: panel for group in run_panels(read(run_folder)).values() for panel in group}
    assert max(panels["Reconstruction"].series[1].steps) == 39


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    np.testing.assert_allclose(smooth(np.full(100, 3.0)), 3.0)
    noisy = np.random.default_rng(0).normal(size=400)
    assert smooth(noisy)[0] == noisy[0]
    assert smooth(noisy)[100:].std() < 0.4
    assert smooth(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_long_noisy_lines_are_thinned_without_losing_a_peak():
    steps = np.arange(40_000, dtype=np.float64)
    values = np.random.default_rng(0).normal(size=40_000)
    values[12_345] = 99.0
    series = Series(steps=steps, values=values, is_noisy=True)
    panel = Panel(title="Loss", summary="", y_label="loss", series=(series,))
    lines = draw_panels([panel]).axes[0].lines
    assert [len(line.get_xdata()) <= MAX_POINTS for line in lines] == [True, True]
    assert lines[0].get_ydata().max() == 99.0
    assert lines[0].get_ydata().min() == values.min()
    assert (lines[1].get_xdata()[0], lines[1].get_xdata()[-1]) == (0.0, 39_999.0)
    assert len(draw_panel(panel)) < 200_000


def test_a_single_record_is_seen(tmp_path):
    series = Series(color=ACCENT, steps=np.array([1.0]), values=np.array([0.5]), is_noisy=True)
    one = draw_panel(Panel(title="Loss", summary="", y_label="loss", series=(series,)))
    none = draw_panel(Panel(title="Loss", summary="", y_label="loss", series=()))
    assert one.count("<use ") > none.count("<use ")
