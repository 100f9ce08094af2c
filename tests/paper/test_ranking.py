"""Ranking: the order of known distances, correlations by hand, wrong input, a whole ranking at the smallest scale."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eqvae.artifacts.files import read_json
from eqvae.cli import run
from eqvae.errors import UserError
from eqvae.paper.plan import describe_base
from eqvae.paper.results import correlations, order, predictors
from eqvae.paper.setting import Setting
from eqvae.runs.rank import RankConfig, make_contestants, rank
from eqvae.runtime.run_folder import flat

NAMES = ("plain", "other", "third")


@pytest.fixture
def settings(setting: Setting) -> dict[str, Setting]:
    """The smallest scale under the name of the tiny one, with three untrained autoencoders."""
    bases = {name: describe_base(name, f"untrained:tiny-kl{'-f2' if name == 'plain' else ''}") for name in NAMES}
    bases |= {"codes": describe_base("codes", "untrained:tiny-vq-f4")}
    return {"tiny": replace(setting, bases={**setting.bases, **bases})}


@pytest.fixture
def config(setting: Setting, images: Path) -> Callable[..., RankConfig]:
    def make(*autoencoders: str, **others: object) -> RankConfig:
        named = tuple(f"{name}=untrained:tiny-kl-f2" for name in NAMES)
        return RankConfig(
            autoencoders=autoencoders or named, out=setting.root, data=str(images), reference_data=str(images),
            scale="tiny", **others,  # type: ignore[arg-type]
        )  # fmt: skip

    return make


def test_correlations_by_hand():
    distances = [10.0, 20.0, 30.0, 40.0]
    found = correlations(
        distances, {"swapped": [1.0, 3.0, 2.0, 4.0], "falling": [4.0, 3.0, 2.0, 1.0], "constant": [1.0, 1.0, 1.0, 1.0]}
    )
    assert [each["measure"] for each in found] == ["falling", "swapped"]
    assert [each["spearman"] for each in found] == pytest.approx([-1.0, 1 - 6 * 2 / (4 * 15)])
    assert [each["kendall"] for each in found] == pytest.approx([-1.0, (5 - 1) / 6])
    assert found[0]["p_value"] == pytest.approx(2 / 24)  # one of 4! orders, and its reverse
    assert correlations([1.0, 2.0], {"two": [1.0, 2.0]}) == []


def test_measures_of_single_transformations_are_no_predictors():
    metrics = {"rfd_x": 1.0, "rfd_x_scale_0.5": 2.0, "ifd_x": 3.0, "psnr_db": 4.0, "name": "x", "ssim": 5.0}
    assert predictors(metrics) == {"ifd_x": 3.0, "rfd_x": 1.0, "psnr_db": 4.0}


def test_the_best_comes_first(config, settings, performed: list[str]):
    path = rank(config(), settings)
    ranking = read_json(path.with_suffix(".json"))
    distances = [each["distance"] for each in ranking["ranking"]]
    assert distances == sorted(distances)
    assert ranking["ranking"][0]["against_best"] is None
    for each in ranking["ranking"][1:]:
        best = ranking["ranking"][0]["values"]
        mean = sum(ours - theirs for ours, theirs in zip(each["values"], best, strict=True)) / 2
        assert each["against_best"]["difference"] == pytest.approx(mean)
        assert len(each["values"]) == 2
    assert {each["num_autoencoders"] for each in ranking["correlations"]} == {3}
    assert performed.count("reference") == 1
    assert len(set(performed)) == len(performed) == 1 + 3 * (1 + 1 + 2)  # evaluation, latents, two seeds
    assert [line.split(" | ")[1] for line in path.read_text().splitlines() if line.startswith("| 1 |")] == [
        ranking["ranking"][0]["autoencoder"]
    ]
    performed.clear()
    rank(config(), settings)
    assert performed == []


def test_what_is_not_measured_comes_last(config, settings):
    _, contestants = make_contestants(config(), settings)
    assert [each.distance for each in order(contestants)] == [None] * 3


def test_every_generator_has_the_same_budget(config, settings):
    _, contestants = make_contestants(config(generator="sit", max_steps=7), settings)
    configs = [flat(run.config) for each in contestants for run in each.distance.runs]
    assert {(each["recipe"], each["max_steps"], each["normalization"]) for each in configs} == {
        ("sit-ti-2", 7, "measured")
    }
    assert sorted(each["seed"] for each in configs) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tiny-kl",), "two autoencoders or more"),
        (("a=tiny-kl", "a=tiny-vq"), "two autoencoders are called 'a'"),
        (("tiny-kl-f2", "codes=untrained:tiny-vq-f4"), "some autoencoders are discrete .codes., others not"),
        (("a=", "b=tiny-kl"), "can't be read"),
    ],
)
def test_wrong_input(config, settings, setting: Setting, given: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        rank(config(*given), settings)
    assert not setting.root.exists()


def test_the_command_line(images: Path, tmp_path: Path, performed: list[str], capsys):
    bases = [f"{name}=untrained:tiny-kl-f2" for name in NAMES[:2]]
    data = ["--data", images, "--reference-data", images]
    assert (
        run(["rank", *bases, *map(str, data), "--out", str(tmp_path / "ranking"), "--seeds", "2", "--scale", "tiny"])
        == 0
    )
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "ranking" / "ranking.md").read_text()
    assert "two" not in shown
    assert "Rank correlations need three autoencoders or more." in shown
    assert run(["rank", *bases, *map(str, data), "--out", str(images)]) == 2


@pytest.mark.slow
def test_a_whole_ranking(config, settings):
    text = rank(config(seeds=1), settings).read_text()
    assert text.count("| (1) |") == 3
