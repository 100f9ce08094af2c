"""Tables that compare autoencoders."""

import pytest

from eqvae.drawing.folders import read_folders
from eqvae.drawing.tables import METRICS, figure_table, latent_statistics, transform_metrics


def read(*folders):
    return read_folders(folders)[0]


def test_changes_are_in_percent_for_errors_and_in_db_for_psnr(two_evaluations):
    table = figure_table(read(*two_evaluations))
    assert [metric.label for metric in table.metrics] == ["Rotation error", "Scale error", "PSNR", "SSIM"]
    (first, base), (second, finetuned) = table.rows
    assert (first, second) == ("base", "finetuned")
    assert [cell.change for cell in base] == ["", "", "", ""]
    assert [cell.change for cell in finetuned] == ["−47%", "−52%", "−0.30 dB", "+0.000"]  # noqa: RUF001
    assert [cell.improves for cell in finetuned] == [True, True, False, None]


def test_the_best_of_a_column_is_marked_and_a_tie_is_not(two_evaluations):
    (_, base), (_, finetuned) = figure_table(read(*two_evaluations)).rows
    assert [cell.is_best for cell in base] == [False, False, True, False]
    assert [cell.is_best for cell in finetuned] == [True, True, False, False]


def test_arrows_point_to_the_better_figures():
    arrows = {metric.key: metric.arrow for metric in METRICS}
    assert arrows["equivariance_error_scale"] == "↓"
    assert arrows["psnr_db"] == "↑"
    assert arrows["latent_std"] == ""


@pytest.mark.parametrize("condition", [{"data": "other"}, {"image_size": 64}])
def test_evaluations_on_other_images_are_not_compared(write_evaluation, condition):
    evaluations = read(write_evaluation("a", psnr_db=20.0), write_evaluation("b", config=condition, psnr_db=30.0))
    (_, (first,)), (_, (second,)) = figure_table(evaluations).rows
    assert second.text == "30.00"
    assert second.change == ""
    assert not first.is_best
    assert not second.is_best


def test_missing_figures_leave_a_dash(write_evaluation):
    evaluations = read(write_evaluation("a", psnr_db=20.0), write_evaluation("b", ssim=0.5))
    (_, first), (_, second) = figure_table(evaluations).rows
    assert [cell.text for cell in first] == ["20.00", "–"]  # noqa: RUF001
    assert [cell.text for cell in second] == ["–", "0.500"]  # noqa: RUF001


def test_single_transformations_are_named_as_figures_name_them(write_evaluation):
    keys = ("rotation_180", "rotation_90", "scale_0.25", "rotation", "scale_0.5")
    evaluations = read(write_evaluation("a", **{f"equivariance_error_{key}": 0.5 for key in keys}))
    assert [metric.label for metric in transform_metrics(evaluations)] == ["90°", "180°", "s = 0.25", "s = 0.5"]


def test_latent_statistics_are_per_channel(write_evaluation):
    evaluations = read(write_evaluation("a", latent_mean_1=-0.25, latent_std_1=2.0))
    assert latent_statistics(evaluations) == [("a", ["0.10 ± 1.50", "−0.25 ± 2.00"])]  # noqa: RUF001
