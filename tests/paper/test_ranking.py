"""Ranking: the order of known distances, correlations by hand, wrong input, a whole ranking at the smallest scale."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eqvae.artifacts.files import read_json, write_json
from eqvae.cli import run
from eqvae.errors import UserError
from eqvae.paper.equalize import EqualizeConfig, equalize
from eqvae.paper.plan import Plan, describe_base
from eqvae.paper.ranking import correlations, order, predictors
from eqvae.paper.setting import Setting
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.rank import RankConfig, make_contestants, rank
from eqvae.runtime.run_folder import change_flat, flat

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
    assert predictors(metrics | {"perceptual_x": 6.0}) == {
        "ifd_x": 3.0, "rfd_x": 1.0, "psnr_db": 4.0, "perceptual_x": 6.0
    }  # fmt: skip


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


def test_a_size_that_no_generator_has_patches_for(config, settings):
    with pytest.raises(UserError, match="96 px need patches of 3 for .* Choose an --image-size of"):
        make_contestants(config("a=untrained:tiny-kl", "b=untrained:tiny-kl", image_size=96), settings)


def test_pictures_drawn_again_are_drawn_as_before(config, settings):
    given = config("codes=untrained:tiny-vq-f4", method=("eq",), equalize=True)
    _, contestants = make_contestants(given, settings)
    for each in contestants:
        drawn = [
            {name: value for name, value in flat(need.config).items() if name not in ("out", "autoencoder")}
            for cell in (each.distance, each.equal.distance)
            for run in cell.runs
            for need in run.needs
            if need.command == "sample"
        ]
        assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]
        assert drawn[0]["guidance_scale"] > 1


def test_fewer_images_than_the_scale_takes_are_all_taken(config):
    setting, _ = make_contestants(config("tiny-kl=untrained:tiny-kl", "other=untrained:tiny-kl"))
    assert (setting.encoding.num_images, setting.evaluation.num_images) == (None, None)
    assert setting.num_images == setting.num_validation_images == 12


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


# Methods --------------------------------------------------------------------------------------------------------------

BASE = "plain=untrained:tiny-kl-f2"


@pytest.fixture
def two_seeds(settings) -> dict[str, Setting]:
    return {"tiny": replace(settings["tiny"], autoencoder_seeds=(0, 1))}


def test_methods_differ_in_the_method_alone(config, two_seeds):
    setting, contestants = make_contestants(
        config(BASE, method=("eq", "eq(transforms=rotation)", "detok(gamma=1.5) + kl:0.1")), two_seeds
    )  # fmt: skip
    assert [each.name for each in contestants] == [
        "none", "plain", "eq", "eq(transforms=rotation)", "detok(gamma=1.5) + kl:0.1"
    ]  # fmt: skip
    plan = Plan.of(run for each in contestants for cell in each.cells for run in cell.runs)
    tuned = {run.name: run for run in plan.runs if run.command == "finetune"}
    assert len(tuned) == 4 * 2
    assert all(run.folder == setting.root / name for name, run in tuned.items())
    flats = [flat(run.config.resolved()) for run in tuned.values()]
    of_methods = {"out", "method", "seed", *(name for name in flats[0] if "weight" in name or name in _TAU)}
    first, *others = ({name: value for name, value in each.items() if name not in of_methods} for each in flats)
    assert all(each == first for each in others)
    scale = {str(run.config.training.mixture()) for name, run in tuned.items() if "+eq" in name}
    assert any("min_scale=0.25" in text and "transforms=paper" in text for text in scale)
    assert any("transforms=rotation" in text for text in scale)
    assert [each.distance.num_autoencoders for each in contestants] == [1, 2, 2, 2, 2]
    trained = [run for run in plan.runs if run.command == "train"]
    assert len(trained) == 2 + 4 * 2 * 2


_TAU = ("transforms", "equivariance_probability", "rotation_probability", "min_scale", "interpolation", "antialias")


def test_a_ranking_of_methods(config, two_seeds, performed: list[str]):
    given = config(BASE, method=("detok",), equalize=True)
    path = rank(given, two_seeds)
    assert len(set(performed)) == len(performed)
    content, text = read_json(path.with_suffix(".json")), path.read_text()
    assert {each["autoencoder"] for each in content["ranking"]} == {"none", "plain", "detok"}
    for each in content["ranking"]:
        assert len(each["values"]) == (2 if each["autoencoder"] == "none" else 4)
        assert (each["against_plain"] is None) == (each["autoencoder"] == "plain")
        assert (each["method"] is None) == (each["autoencoder"] == "none")
    by_name = {each["autoencoder"]: each for each in content["ranking"]}
    measured = [read_json(folder / "metrics.json") for folder in (given.out / "evaluations").glob("plain+detok-*")
                if not folder.name.endswith("-equal")]  # fmt: skip
    assert len(measured) == 2
    mean = sum(each["intrinsic_dimension"] for each in measured) / 2
    assert by_name["detok"]["predictors"]["intrinsic_dimension"] == pytest.approx(mean)
    equal = {each["autoencoder"]: each for each in content["equal_reconstruction"]}
    assert equal["plain"]["decoder_steps"] == [1, 1]
    assert equal["none"]["decoder_steps"] == []
    assert equal["detok"]["shortfalls_db"] == [0.5, 0.5]
    assert "- `detok` misses 0.50 dB at the limit." in text
    assert "against plain" in text
    assert {each["num_autoencoders"] for each in content["correlations"]} == {3}
    generators = [name for name in performed if name.startswith("generators/")]
    assert len(generators) == 2 + 2 * 4, "equal reconstruction trains none anew"
    place = performed.index
    first = [name for name in performed if name.endswith("seed-0") and name.startswith("generators/")]
    assert place(first[2]) < min(
        place(name) for name in performed if name.startswith("autoencoders/") and "-seed-1" in name
    ), "early"
    performed.clear()
    rank(given, two_seeds)
    assert performed == []


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ((BASE,), {"method": ("eqq",)}, "--method has no 'eqq'"),
        ((BASE, "other=untrained:tiny-kl-f2"), {"method": ("eq",)}, "methods of one base, and 2 are named"),
        ((BASE,), {"method": ("eq", "eq(transforms=paper)")}, "are the same"),
        ((BASE,), {"method": ("eq",), "equalize": True, "equalize_chunks": 0}, "--equalize-chunks is 0"),
        ((BASE,), {"method": ("eq",), "equalize_chunks": 9}, "--equalize-chunks is of --equalize. Give both"),
        ((BASE,), {"method": ("eq",), "max_steps": 0}, "--max-steps is 0. It must be at least 1"),
        ((BASE, "other=untrained:tiny-kl-f2"), {"equalize": True}, "--equalize is of methods, and no --method is"),
        (("codes=untrained:tiny-vq-f4",), {"method": ("detok",)}, "--method detok makes no sense for"),
    ],
)
def test_wrong_methods(config, settings, setting: Setting, given, changes, message: str):
    with pytest.raises(UserError, match=message):
        rank(config(*given, **changes), settings)
    assert not setting.root.exists()


def test_what_methods_would_cost(images: Path, tmp_path: Path, capsys):
    data = ["--data", str(images), "--reference-data", str(images), "--out", str(tmp_path / "ranking")]
    arguments = ["rank", "untrained:tiny-kl-f2", "--method", "eq", "--scale", "tiny", "--seeds", "1", "--dry-run"]
    assert run([*arguments, "--equalize", "--device-name", "cpu", *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[0] for line in lines[1:-2]]
    assert {name: commands.count(name) for name in set(commands)} == {
        "finetune": 2, "evaluate": 5, "encode": 3, "reference": 1, "train": 3, "equalize": 2, "sample": 3, "score": 3
    }  # fmt: skip
    assert not (tmp_path / "ranking").exists()


def test_decoders_go_on_in_chunks(setting: Setting, monkeypatch, tmp_path: Path):
    """Against a stand-in of fine-tuning whose PSNR grows by a dB a chunk; what was begun goes on."""
    tuned, calls = tmp_path / "tuned", []
    (tuned / "autoencoder").mkdir(parents=True)
    (tuned / "autoencoder" / "from").write_text("tuned")

    def stand_in(config: FinetuneConfig) -> dict[str, float]:
        calls.append(flat(config)["max_steps"])
        (config.out / "autoencoder").mkdir(parents=True, exist_ok=True)
        (config.out / "autoencoder" / "from").write_text(str(calls[-1]))
        write_json(config.out / "config.json", flat(config) | {"command": "finetune"})
        return {"psnr_db": 20.0 + calls[-1] / 10}

    monkeypatch.setattr("eqvae.paper.equalize.finetune", stand_in)
    config = change_flat(
        EqualizeConfig.after(setting.finetuning, chunk_steps=10, max_chunks=4), autoencoder=str(tuned)
    )  # fmt: skip
    for psnr, target, steps, shortfall in ((20.0, 21.9, [10, 20], 0.0), (22.0, 21.9, [], 0.0),
                                           (20.0, 30.0, [10, 20, 30, 40], 6.0)):  # fmt: skip
        calls.clear()
        write_json(tuned / "metrics.json", {"psnr_db": psnr, "before_psnr_db": target})
        own = change_flat(config, out=tmp_path / f"equal-{target}-{psnr}")
        figures = equalize(own)
        assert calls == steps
        assert figures["shortfall_db"] == pytest.approx(shortfall)
        assert figures["num_steps"] == (steps or [0])[-1]
        assert (own.out / "autoencoder" / "from").read_text() == (str(steps[-1]) if steps else "tuned")
    (own.out / "metrics.json").unlink()  # as if it had been killed at its end
    calls.clear()
    equalize(own)
    assert calls == [40]


@pytest.mark.slow
def test_latents_stay_as_they_are_at_equal_reconstruction(config, settings):
    """The whole of it, without stand-ins: encoders are the arms' own, bit for bit, and pictures are drawn anew."""
    from eqvae import load_autoencoder

    setting = replace(settings["tiny"], seeds=(0,))
    given = config(BASE, method=("eq",), equalize=True, equalize_chunks=1)
    text = rank(given, {"tiny": setting}).read_text()
    assert "At equal reconstruction" in text
    for folder in (given.out / "equalized").iterdir():
        ours, theirs = (load_autoencoder(str(each)) for each in (folder, given.out / "autoencoders" / folder.name))
        assert ours.encoder_fingerprint() == theirs.encoder_fingerprint()
        figures = read_json(folder / "metrics.json")
        assert (ours.fingerprint() == theirs.fingerprint()) == (figures["num_steps"] == 0)


@pytest.mark.slow
def test_a_whole_ranking(config, settings):
    text = rank(config(seeds=1), settings).read_text()
    assert text.count("| (1) |") == 3
