"""Figure 3: bars of Frechet distances after transformations."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from eqvae.drawing.charts import ACCENT, BASE, INK
from eqvae.drawing.evaluation_charts import (
    charts_of_one,
    distance_charts,
    distance_figure,
    draw_distances,
    show_distance,
)
from eqvae.drawing.folders import read_folders


def charts(*folders):
    return distance_charts(read_folders(folders)[0])


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (107.9, "107"), (1234.5, "1234"), (10.0, "10"), (9.99, "9.9"), (3.41, "3.4"), (2.3, "2.3"), (1.0, "1.0"),
        (0.999, "0.99"), (0.412, "0.41"), (0.0349, "0.034"), (0.00123, "0.0012"), (0.0, "0"), (-1e-9, "0"), (1e-5, "0"),
    ],
)  # fmt: skip
def test_figures_are_rounded_down_as_in_the_paper(value, printed):
    assert show_distance(value) == printed


def test_groups_are_the_papers(full_evaluations):
    (chart,) = charts(*full_evaluations)
    assert chart.distance.label == "rFID"
    assert chart.groups == ("s = 0.75", "s = 0.50", "s = 0.25", "R(θ)")
    assert [(bars.name, bars.color) for bars in chart.entries] == [("base", BASE), ("finetuned", ACCENT)]
    assert chart.entries[0].values == (52.7, 83.4, 107.9, 64.2)
    assert chart.summary.startswith("s = 0.75: base 52, finetuned 12; s = 0.50: base 83")


def test_every_bar_bears_its_figure_and_takes_the_pages_colours(full_evaluations):
    (chart,) = charts(*full_evaluations)
    for svg in (draw_distances(chart, "bars"), distance_svg_of_card(chart)):
        ElementTree.fromstring(svg)
        assert {"52", "83", "107", "64", "12", "16", "25", "3.4"} <= set(re.findall(r">([\d.]+)</text>", svg))
        assert "var(--accent" in svg
        assert "var(--base" in svg
        assert re.findall(rf"(?<!, )({ACCENT}|{BASE}|{INK})", svg) == [], "every colour is a variable"
    assert 'id="bars-' in draw_distances(chart, "bars")


def distance_svg_of_card(chart):
    return draw_distances(chart, "card", small=True)


def test_a_card_keeps_the_common_scale(full_evaluations):
    (chart,) = charts(*full_evaluations)
    (alone,) = charts_of_one([chart], "finetuned")
    assert [bars.name for bars in alone.entries] == ["finetuned"]
    assert alone.top == chart.top > 107.9
    assert charts_of_one([alone], "base") == []


def test_one_that_stands_alone_has_the_accent(full_evaluations):
    (chart,) = charts(full_evaluations[0])
    assert chart.entries[0].color == ACCENT


def test_what_was_not_measured_is_left_out(write_evaluation):
    (chart,) = charts(
        write_evaluation("a", **{"rfid_scale_0.5": 2.0, "rfid_rotation": 3.0}),
        write_evaluation("b", **{"rfid_scale_0.5": 1.0, "rfid_rotation": float("1e-7")}),
        write_evaluation("c", **{"rfid_scale_0.5": 4.0}),
        write_evaluation("d", psnr_db=20.0),
    )
    assert [bars.values for bars in chart.entries] == [(2.0, 3.0), (1.0, 1e-7), (4.0, None)]
    assert "c not measured" in chart.summary
    ElementTree.fromstring(draw_distances(chart, "bars"))


def test_other_conditions_and_other_features_get_charts_of_their_own(write_evaluation):
    found = charts(
        write_evaluation("a", **{"rfid_scale_0.5": 2.0}),
        write_evaluation("b", config={"precision": "bf16"}, **{"rfid_scale_0.5": 2.0}),
        write_evaluation("c", **{"rfd_efficientnet_lite0_scale_0.5": 0.2}),
        write_evaluation("d", config={"precision": "fp32"}, **{"rfid_scale_0.5": 1.0}),
    )
    names = [(chart.distance.label, [bars.name for bars in chart.entries]) for chart in found]
    assert names == [("rFID", ["a", "d"]), ("rFD (efficientnet-lite0)", ["c"]), ("rFID", ["b"])]


def test_many_bars_get_room_for_their_figures(write_evaluation, frechet_distances):
    figures = frechet_distances(*[123.4] * 7, r=1.0, i=1.0)
    few = charts(*(write_evaluation(str(index), **figures) for index in range(2)))[0]
    many = charts(*(write_evaluation(str(index), **figures) for index in range(8)))[0]
    assert not few.is_wide
    assert many.is_wide
    assert many.width_inches * 72 > 8 * 4 * 3 * 6


def test_the_file_has_a_legend_for_two_and_none_for_one(full_evaluations):
    (chart,) = charts(*full_evaluations)
    assert [text.get_text() for text in distance_figure(chart).legends[0].get_texts()] == ["base", "finetuned"]
    assert distance_figure(charts_of_one([chart], "base")[0]).legends == []
