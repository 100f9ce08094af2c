"""Which figures stand in which table."""

import pytest

from eqvae.drawing.folders import read_folders
from eqvae.drawing.tables import (
    METRICS,
    Metric,
    card_columns,
    distances,
    figure_table,
    main_columns,
    predictor_columns,
    transform_metrics,
)

OTHER = "fd_efficientnet_lite0"


def read(*folders):
    return read_folders(folders)[0]


def test_without_features_the_main_table_stays_as_it_was(two_evaluations):
    assert main_columns(read(*two_evaluations)) == METRICS
    assert predictor_columns(read(*two_evaluations)) == ()


def test_what_predicts_a_generator_gets_a_table_with_errors_and_units(full_evaluations):
    evaluations = read(*full_evaluations)
    table = figure_table(evaluations, predictor_columns(evaluations))
    labels = [metric.label for metric in table.metrics]
    assert labels == ["Intrinsic dimension", "iFID", "Spectrum excess", "Rotation error", "Scale error", "Latent std"]
    (_, base), (_, finetuned) = table.rows
    assert [cell.text for cell in base[:3]] == ["62.2 ± 0.4", "21.30", "7.3"]
    assert [cell.text for cell in finetuned[:3]] == ["39.4 ± 0.3", "13.80", "−2.1"]  # noqa: RUF001
    assert [cell.change for cell in finetuned[:3]] == ["−37%", "−35%", "−9.4 dB"]  # noqa: RUF001
    assert [cell.improves for cell in finetuned[:3]] == [True, True, True]


def test_the_latents_spread_stands_in_one_table_only(full_evaluations):
    evaluations = read(*full_evaluations)
    labels = [metric.label for metric in figure_table(evaluations, main_columns(evaluations)).metrics]
    assert labels == ["Rotation error", "Scale error", "rFID", "PSNR", "SSIM"]


def test_only_inceptions_distance_is_called_fid(write_evaluation, frechet_distances):
    figures = frechet_distances(*[1.0] * 7, r=0.034, i=1.21, features=OTHER)
    evaluations = read(write_evaluation("a", config={"features": "efficientnet-lite0"}, **figures))
    (reconstruction,), (interpolation,) = distances(evaluations, "r"), distances(evaluations, "i")
    assert (reconstruction.key, reconstruction.label) == (f"r{OTHER}", "rFD (efficientnet-lite0)")
    assert interpolation.label == "iFD (efficientnet-lite0)"
    assert not reconstruction.is_fid
    assert reconstruction.show(0.034) == "0.0340"


@pytest.mark.parametrize(
    ("config", "key", "label"),
    [
        ({"features": "vit_small.lvd142m"}, "rfd_vit_small_lvd142m", "rFD (vit_small.lvd142m)"),
        ({"features": None}, f"r{OTHER}", "rFD (efficientnet-lite0)"),
        ({}, "rfid", "rFID"),
    ],
)
def test_features_are_named_as_the_user_named_them(write_evaluation, config, key, label):
    (distance,) = distances(read(write_evaluation("a", config=config, **{key: 1.5})), "r")
    assert (distance.key, distance.label) == (key, label)


def test_distances_are_found_by_those_after_transformations_too(write_evaluation):
    evaluations = read(write_evaluation("a", **{f"r{OTHER}_scale_0.5": 1.0, f"r{OTHER}_rotation": 2.0}))
    assert [distance.key for distance in distances(evaluations, "r")] == [f"r{OTHER}"]
    assert [metric.label for metric in transform_metrics(evaluations, f"r{OTHER}")] == ["s = 0.5"]


def test_distances_that_are_no_numbers_are_none(write_evaluation):
    assert distances(read(write_evaluation("a", rfid=None, recall=0.5, fid=3.0)), "r") == ()


def test_cards_hold_six_figures(full_evaluations):
    labels = [metric.label for metric in card_columns(read(*full_evaluations))]
    assert labels == ["rFID", "PSNR", "Rotation error", "Scale error", "Intrinsic dimension", "iFID"]


def test_the_two_ways_to_interpolate_are_two_columns(write_evaluation):
    folder = write_evaluation("both", **{"ifid": 5.0, "ifid_authors": 7.0, f"i{OTHER}_authors": 30.0})
    labels = [metric.label for metric in distances(read(folder), "i")]
    assert labels == ["iFID", "iFID, authors' code", "iFD (efficientnet-lite0), authors' code"]


def test_unbiased_distances_below_zero_change_by_a_difference():
    distance = Metric(key="kid", label="KID", digits=4)
    assert distance.show_change(-0.0001, 0.0010) == "+0.0011"
    assert distance.show_change(0.0010, 0.0005) == "\N{MINUS SIGN}50%"
    assert distance.show_change(0.0, 0.0005) == ""
