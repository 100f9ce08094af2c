"""Comparisons of training runs: figures, tables and sentences from folders of known speed-up."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.artifacts.files import read_json, write_json
from eqvae.drawing.comparison import CAVEAT, comparison_markdown, headline_lines, show_interval
from eqvae.drawing.comparison_charts import TIMES, curves_figure, speed_up_figure
from eqvae.drawing.tables import MISSING, with_minus_sign
from eqvae.errors import UserError
from eqvae.evidence.arms import compare_arms, read_arms
from eqvae.evidence.intervals import Interval
from eqvae.runs.compare import CompareConfig, compare

Q = "fd_efficientnet_lite0"


STEPS = np.arange(10, 110, 10)
FILES = {
    "comparison.json", "comparison.md", "config.json", "environment.json", "curves_images.svg", "curves_images.png",
    "curves_time.svg", "curves_time.png", "speed_up.svg", "speed_up.png",
}  # fmt: skip


def distances(ratio: float, shift: float = 0.0) -> list[float]:
    return (20.0 + shift + 100.0 * (ratio * STEPS / 10) ** -0.7).tolist()


@pytest.fixture
def folders(write_run) -> list[Path]:
    """Three seeds on each of two autoencoders, the second twice as fast in images, as fast in time."""
    folders = []
    for seed, shift in enumerate((-0.5, 0.0, 0.5)):
        folders.append(write_run(f"base-{seed}", distances(1.0, shift), seed=seed))
        more = {"autoencoder": "tiny-kl-eq", "sec_per_step": 1.0}
        folders.append(write_run(f"eq-{seed}", distances(2.0, 0.9 * shift), seed=seed, **more))
    return folders


def compared(*folders: Path):
    return compare_arms(read_arms(folders))


# What is written ------------------------------------------------------------------------------------------------------


def test_a_comparison_is_written(folders, tmp_path: Path):
    out = tmp_path / "out"
    comparison = compare(CompareConfig(runs=tuple(folders), out=out))
    assert {path.name for path in out.iterdir()} == FILES
    record = read_json(out / "comparison.json")
    assert record["base"] == "dit-ti-2 on tiny-kl"
    assert (record["metric"], record["num_samples"], record["reference"]) == (Q, 50, "photos")
    assert record["headline"] == headline_lines(comparison)
    base, arm = record["arms"]
    assert (base["seeds"], arm["autoencoder"], arm["recipe"]) == ([0, 1, 2], "tiny-kl-eq", "dit-ti-2")
    assert base["num_images"] == (4 * STEPS).tolist()
    assert arm["mean_training_sec"] == pytest.approx(STEPS)
    assert base["mean"] == pytest.approx(distances(1.0))
    assert base["runs"][0]["values"] == distances(1.0, -0.5)
    (found,) = record["comparisons"]
    assert found["num_resamples"] == 0  # seeds are paired
    assert len(found["levels_in_images"]) == len(found["levels_in_time"]) == 20
    assert found["in_images"]["level"] == pytest.approx(distances(1.0)[-1])
    assert found["in_images"]["ratio"] == pytest.approx(2.0, rel=1e-3)  # it lies on one of the arm's validations
    assert found["in_time"]["ratio"] == pytest.approx(1.0, rel=1e-3)
    assert found["in_images"]["interval"]["low"] <= 2.0 <= found["in_images"]["interval"]["high"]
    assert found["final"]["num_images"] == 400
    assert found["final"]["difference"] == pytest.approx(distances(2.0)[-1] - distances(1.0)[-1])
    assert found["final"]["shown"] is True


def test_figures_are_pictures_and_the_same_again(folders, tmp_path: Path):
    config = CompareConfig(runs=tuple(folders), out=tmp_path / "out")
    compare(config)
    first = {path.name: path.read_bytes() for path in config.out.iterdir()}
    for name in ("curves_images", "curves_time", "speed_up"):
        ElementTree.parse(config.out / f"{name}.svg")
        with Image.open(config.out / f"{name}.png") as picture:
            assert picture.width > 800
    compare(config)
    again = {path.name: path.read_bytes() for path in config.out.iterdir()}
    assert [name for name in first if first[name] != again[name]] in ([], ["environment.json"])  # it holds the time


def test_another_comparison_is_not_written_over(folders, tmp_path: Path):
    out = tmp_path / "out"
    compare(CompareConfig(runs=tuple(folders), out=out))
    with pytest.raises(UserError, match="holds a comparison of other runs"):
        compare(CompareConfig(runs=tuple(folders[:4]), out=out))
    assert len(read_json(out / "comparison.json")["arms"][0]["seeds"]) == 3


def test_another_base(folders, tmp_path: Path):
    config = CompareConfig(runs=tuple(folders), out=tmp_path / "out", base="dit-ti-2 on tiny-kl-eq")
    comparison = compare(config)
    assert [arm.name for arm in comparison.arms] == ["dit-ti-2 on tiny-kl-eq", "dit-ti-2 on tiny-kl"]
    (found,) = comparison.comparisons
    assert (found.in_images.bound, found.in_images.arm_reaches) == ("at_most", "never")
    with pytest.raises(UserError, match="Did you mean 'dit-ti-2 on tiny-kl'"):
        compare(CompareConfig(runs=tuple(folders), out=tmp_path / "no", base="dit-ti-2 on tiny-k"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("field", "value"), [("num_resamples", 10), ("seed", -1)])
def test_values_that_make_no_sense(folders, tmp_path: Path, field: str, value: int):
    with pytest.raises(UserError, match=field.replace("_", "-")):
        compare(CompareConfig(runs=tuple(folders), out=tmp_path / "out", **{field: value}))


# What is said ---------------------------------------------------------------------------------------------------------


def test_the_headline_of_a_gain_that_shows(folders):
    speed, final = headline_lines(compared(*folders))
    assert speed.startswith("dit-ti-2 on tiny-kl reaches FD (efficientnet-lite0) 40.0 after 400 images; ")
    assert "dit-ti-2 on tiny-kl-eq after 200 images: 2.00 times as fast in images (95%: 1." in speed
    assert "; seeds: 1." in speed
    assert ", 1.00 in training time (95%: 0.99 to 1.01; " in speed
    assert final == (
        "After 400 images dit-ti-2 on tiny-kl-eq has 32.3 against the base's 40.0: "
        + with_minus_sign("-7.7 (95%: -7.8 to -7.5")
        + ", paired t, 3 seeds); better: shown."
    )


def test_a_gain_that_does_not_show_is_called_so(write_run):
    runs = [write_run(f"base-{seed}", distances(1.0, shift), seed=seed) for seed, shift in enumerate((0.0, 3.0))]
    runs += [write_run(f"eq-{seed}", distances(1.0, 2.0 - seed), seed=seed, autoencoder="eq") for seed in range(2)]
    comparison = compared(*runs)
    assert headline_lines(comparison)[1].endswith("paired t, 2 seeds); not shown at this scale.")
    assert comparison.comparisons[0].final.shown is False


def test_one_seed_has_no_interval(write_run):
    comparison = compared(write_run("base", distances(1.0)), write_run("eq", distances(2.0), autoencoder="eq"))
    speed, final = headline_lines(comparison)
    assert "95%" not in speed + final
    assert final.endswith("one seed in an arm, so there is no interval, and it is not shown.")
    assert comparison.comparisons[0].num_resamples == 0
    assert "one seed has no interval" in CAVEAT in comparison_markdown(comparison)


def test_an_arm_that_never_gets_there_is_bounded(write_run):
    comparison = compared(write_run("base", distances(1.0)), write_run("eq", distances(0.5), autoencoder="eq"))
    line = headline_lines(comparison)[0]
    assert "dit-ti-2 on eq has not reached it after 400 images: not reached, less than 1.00 times as fast" in line
    assert "| > 400 | ≤ 1.00 |" in comparison_markdown(comparison)


def test_an_arm_that_is_better_from_the_start_is_bounded(write_run):
    comparison = compared(write_run("base", distances(1.0)), write_run("eq", distances(40.0), autoencoder="eq"))
    line = headline_lines(comparison)[0]
    assert "dit-ti-2 on eq at its first validation, after 40 images: at least 10.0 times as fast in images" in line
    assert "| ≤ 40 | ≥ 10.0 |" in comparison_markdown(comparison)


def test_arms_without_a_common_number_of_images(write_run):
    comparison = compared(write_run("base"), write_run("eq", autoencoder="eq", every=7))
    assert comparison.comparisons[0].final is None
    assert "no final difference is computed" in headline_lines(comparison)[1]


def test_the_final_difference_is_taken_where_the_shorter_arm_ends(write_run):
    comparison = compared(write_run("base", [9.0, 6.0, 5.0]), write_run("eq", [8.0, 4.5], autoencoder="eq"))
    final = comparison.comparisons[0].final
    assert (final.num_images, final.base, final.arm) == (80, 6.0, 4.5)


def test_the_page_has_a_table_of_all_levels(folders):
    page = comparison_markdown(compared(*folders))
    table = page[page.index("## dit-ti-2 on tiny-kl-eq") :].split("\n\n")[1].splitlines()
    assert len(table) == 2 + 1 + 20
    assert {line.count("|") for line in table} == {10}
    assert table[2].startswith("| **40.0, the base's last** | 400 | 200 | 2.00 | 1.")
    assert "50 samples of 32 px against `photos`; 8 sampling steps" in page
    assert "| dit-ti-2 on tiny-kl | 0, 1, 2 | 400 | 50.0 s | 40.0 | 0.5 | 40.0 |" in page


def test_notes_say_what_to_know_before_believing(write_run):
    base = [write_run(f"base-{seed}", seed=seed) for seed in range(2)]
    half = write_run("half", [8.0, 5.0], autoencoder="eq", max_steps=30)
    arm = [half, write_run("whole", autoencoder="eq", seed=5, recipe="dit-ti-2")]
    write_json(half / "environment.json", {"device": "NVIDIA H100"})
    notes = " ".join(compared(*base, *arm).notes)
    assert "differ in their device (cpu (test), NVIDIA H100)" in notes
    assert "Not finished: 'half' (80 images)" in notes
    assert "unpaired" in CAVEAT
    assert "too narrow" in CAVEAT
    other = write_run("other", recipe="repa-sit-ti-2", max_grad_norm=1.0)
    free = write_run("free", max_grad_norm=0.0)
    assert any("differ in max_grad_norm" in note for note in compared(free, other).notes)
    assert compared(base[0], other).notes == (), "what the other recipe does not have is no difference"


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        ((1.234, 2.0), "1.23 to 2.00"),
        ((1.5, None), "1.50 or more"),
        ((None, 12.34), "up to 12.3"),
        ((None, None), MISSING),
    ],
)
def test_intervals(interval: tuple[float | None, float | None], shown: str):
    assert show_interval(Interval(low=interval[0], high=interval[1])) == shown
    assert show_interval(None) == MISSING


# What is drawn --------------------------------------------------------------------------------------------------------


def test_curves_are_means_with_seeds(folders):
    comparison = compared(*folders)
    images, time = curves_figure(comparison, "images"), curves_figure(comparison, "time")
    assert [text.get_text() for text in images.legends[0].get_texts()] == [arm.name for arm in comparison.arms]
    (axes,) = images.axes
    means = [line for line in axes.lines if not line.get_label().startswith("_")]
    np.testing.assert_allclose(means[0].get_ydata(), distances(1.0))
    np.testing.assert_allclose(means[1].get_xdata(), 4.0 * STEPS)
    assert len(axes.collections) == 2, "a band for each arm"
    assert f"2.00{TIMES}" in [text.get_text() for text in axes.texts]
    assert time.axes[0].get_xlabel() == "training time, seconds"
    assert axes.get_xlim()[0] == 0.0


@pytest.mark.parametrize(("sec_per_step", "unit"), [(0.5, "seconds"), (5.0, "minutes"), (300.0, "hours")])
def test_times_have_a_fitting_unit(write_run, sec_per_step: float, unit: str):
    runs = [write_run(name, autoencoder=name, sec_per_step=sec_per_step) for name in ("a", "b")]
    assert curves_figure(compared(*runs), "time").axes[0].get_xlabel() == f"training time, {unit}"


def test_bounds_are_open_triangles(write_run):
    runs = [write_run("base", distances(1.0)), write_run("eq", distances(3.0), autoencoder="eq")]
    runs.append(write_run("slow", distances(0.5), autoencoder="slow"))
    comparison = compared(*runs)
    images, time = speed_up_figure(comparison).axes
    for axes, name in ((images, "levels_in_images"), (time, "levels_in_time")):
        for markers, bound in (("^", "at_least"), ("v", "at_most"), ("sD", "exact")):
            drawn = [point for line in axes.lines if line.get_marker() in markers for point in line.get_ydata()]
            known = [item for arm in comparison.comparisons for item in getattr(arm, name) if item.bound == bound]
            assert sorted(drawn) == sorted(item.ratio for item in known)
            assert drawn
    assert images.xaxis_inverted()
    assert images.get_yscale() == "log"
    texts = [text.get_text() for text in images.figure.legends[0].get_texts()]
    assert texts == ["dit-ti-2 on eq", "dit-ti-2 on slow"]
