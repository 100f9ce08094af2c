"""The small scale: what it costs, fine-tunings with several seeds, the headline, the question of causes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqvae.artifacts.files import read_json, write_json
from eqvae.errors import Interrupted, UserError
from eqvae.evidence.arms import read_arms
from eqvae.paper import execution
from eqvae.paper.arms import equivariant, more_training
from eqvae.paper.causes import causes
from eqvae.paper.headline import headline, readme_rows
from eqvae.paper.plan import Plan, PlannedRun
from eqvae.paper.results import write_item
from eqvae.paper.setting import Setting
from eqvae.paper.settings import SMALL, TINY
from eqvae.paper.tables import TABLES, table5, table9
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.reproduce import ReproduceConfig, reproduce
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import flat

# What two cores of an AMD EPYC gave with a thread for each of two processes, images or steps a second.
STEP_SEC, POLISHING_STEP_SEC = 1.5, 1.2
ENCODED, DECODED, TRAINED, SEEN_BY_FEATURES = 60.0, 100.0, 175.0, 60.0
EVALUATED_SEC = 0.45
HOURS = 6.0


def core_seconds(run: PlannedRun) -> float:
    config: Any = run.config
    if isinstance(config, FinetuneConfig):
        training = config.training
        return training.max_steps * STEP_SEC + training.polish_steps * POLISHING_STEP_SEC
    if isinstance(config, TrainConfig):
        watched = config.num_watch_samples * (-(-config.max_steps // (config.sample_every or config.max_steps)))
        num_calls = (config.watch_steps or 50) * (2 if config.watch_sampler == "heun" else 1)
        per_sample = num_calls / (3 * TRAINED) + 1 / DECODED + 1 / SEEN_BY_FEATURES
        return config.max_steps * config.batch_size / TRAINED + watched * per_sample
    if run.command == "encode":
        return 2 * SMALL.num_images / ENCODED
    if run.command == "evaluate":
        return (config.num_images or SMALL.num_validation_images) * EVALUATED_SEC
    return SMALL.num_reference_images / SEEN_BY_FEATURES


def test_table_5_fits_into_six_hours_of_two_cores():
    plan = Plan.of(table5(SMALL).runs)
    kinds = [run.command for run in plan.runs]
    assert (kinds.count("finetune"), kinds.count("train"), kinds.count("encode")) == (4 * 2, (1 + 4 * 2) * 3, 9)
    assert sum(map(core_seconds, plan.runs)) / 2 / 3600 < HOURS


def test_learning_curves_are_longer_than_tables():
    long = [run.config for run in Plan.of(table9(SMALL).runs).runs if isinstance(run.config, TrainConfig)]
    assert all(config.max_steps * config.batch_size >= 400_000 for config in long)
    rows = {row.label: row for row in table9(SMALL).rows}
    assert rows["SiT-XL/2 + EQ-VAE, 50K"].cells["fid"].step == 800
    assert {"fid", "kid", "precision", "recall"} == set(rows["SiT-XL/2 + EQ-VAE, 400K"].cells)
    assert all(not run.name.startswith("generators/sit-ti-2/taesd/seed") for run in table9(SMALL).runs)


def test_tables_say_by_what_each_family_is_measured():
    (several, *_), (repa, *_) = table9(SMALL).notes, TABLES["table10"](SMALL).notes
    assert (
        "dit 1000 samples of 20 steps of ddim while training, 10000 of 20 of ddim in sample sets; sit 1000" in several
    )
    assert repa.startswith("Distances: 1000 samples of 10 steps of heun while training, 10000 of 10 of heun in sample")


def test_every_fine_tuning_is_polished_and_done_with_both_seeds():
    for tuned in (equivariant(SMALL, "taesd"), more_training(SMALL, "taesd"), equivariant(SMALL, "tiny-vq")):
        configs = [each.run.config.training for each in tuned.all_seeds]
        assert [config.seed for config in configs] == [0, 1]
        assert all(config.polish_steps > 0 for config in configs)
        assert [each.name for each in tuned.all_seeds] == [tuned.name, f"{tuned.name}-seed-1"]
    assert equivariant(TINY, "tiny-kl").twins == ()
    assert SMALL.base("taesd").twins == ()


@pytest.fixture
def twins(setting: Setting) -> Setting:
    """The smallest scale with two fine-tunings of each recipe and longer learning curves."""
    long = {
        family: replace(setting.training[family], max_steps=8, sample_every=1) for family in ("dit", "sit", "repa-sit")
    }
    return replace(
        setting, autoencoder_seeds=(0, 1), kernel_distances=True, both_normalizations=False, long_training=long
    )


@pytest.fixture
def reproduced(twins: Setting) -> Callable[..., list[Path]]:
    def run(*items: str, **options: Any) -> list[Path]:
        config = ReproduceConfig(items=items, out=twins.root, device="cpu", scale="tiny", **options)
        return reproduce(config, {"tiny": twins})

    return run


def test_cells_hold_autoencoders_and_seeds(reproduced, twins: Setting, performed: list[str]):
    markdown, record = reproduced("table5")
    assert len(performed) == len(set(performed)) == 8 + 9 + 9 + 1 + 9 * 2
    assert performed.index("generators/dit-ti-2/tiny-kl-f2+eq-seed-1/seed-0") > performed.index(
        "generators/dit-ti-2/tiny-kl-f2+anisotropic/seed-1"
    )
    rows = {row["label"]: row["figures"] for row in read_json(record)["rows"]}
    base, ours = rows["none (SD-VAE)"]["gfid"], rows["R(θ) · S(s, s)"]["gfid"]
    assert (len(base["values"]), len(ours["values"]), len(rows["R(θ)"]["rfid"]["values"])) == (2, 4, 2)
    found = ours["difference"]
    assert (found["method"], found["num_autoencoders"], found["num_seeds"]) == ("nested t", 2, 2)
    assert found["difference"] == pytest.approx(sum(ours["values"]) / 4 - sum(base["values"]) / 2)
    assert rows["R(θ)"]["gkid"]["difference"]["interval"] is not None
    text = markdown.read_text()
    assert "gkd_efficientnet_lite0" in text and "nested analysis of variance" in text and "base's factor" not in text
    before = list(performed)
    reproduced("table5", autoencoder_seeds=1)
    assert performed == before


def test_a_root_of_one_fine_tuning_goes_on_with_two(reproduced, performed: list[str]):
    reproduced("table8", autoencoder_seeds=1)
    before = set(performed)
    reproduced("table8")
    added = set(performed) - before
    assert len(performed) == len(before) + len(added)
    assert added and all("seed-1" in name for name in added)


def write_autoencoder(run: PlannedRun) -> None:
    """Leave the card that `eqvae compare` knows twins by."""
    recipe = flat(run.config) | {"command": "finetune"}
    card = {"base": "tiny", "base_fingerprint": "0", "num_steps": 4, "recipe": recipe}
    write_json(run.folder / "autoencoder" / "eqvae.json", card)


def test_compare_knows_the_twins_of_a_plan(reproduced, twins: Setting, performed: list[str], monkeypatch):
    reproduced("table5")
    item = table5(twins)
    for run in Plan.of(item.runs).runs:
        if run.command == "finetune":
            write_autoencoder(run)
        if run.command == "encode":
            write_json(run.folder / "index.json", {"autoencoder": run.config.autoencoder})
    folders = [run.folder for row in (item.rows[0], item.rows[3]) for run in row.cells["gfid"].runs]
    for folder in folders:
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", config | {"latents_fingerprint": config["latents"]})
    base, ours = read_arms(folders)
    assert (base.num_autoencoders, ours.num_autoencoders, len(ours.runs)) == (1, 2, 4)


# The headline ---------------------------------------------------------------------------------------------------------


def test_the_headline_is_written_while_runs_are_under_way(
    reproduced, twins: Setting, performed: list[str], monkeypatch
):
    pretended = execution.perform

    def some(run: PlannedRun) -> None:
        if run.name.startswith("generators/maskgit"):
            raise KeyboardInterrupt
        pretended(run)

    monkeypatch.setattr("eqvae.paper.headline.NAMES", {"sit": "SiT", "maskgit": "MaskGIT"})
    monkeypatch.setattr(execution, "perform", some)
    with pytest.raises(Interrupted, match="SIGINT"):
        reproduced("headline")
    unfinished = read_json(twins.root / "headline.json")
    assert unfinished["maskgit"] is None
    assert (unfinished["sit"]["num_seeds"], unfinished["sit"]["low"]) == (1, None)
    assert "Without finished runs so far: MaskGIT." in (twins.root / "headline.md").read_text()
    monkeypatch.setattr(execution, "perform", pretended)
    text = next(file for file in reproduced("headline") if file.suffix == ".md").read_text()
    assert len(performed) == len(set(performed))
    found = read_json(twins.root / "headline.json")
    assert found.keys() == {"sit", "maskgit", "scale"}
    for family in ("sit", "maskgit"):
        each = found[family]
        assert each["speed_up"] > 0 and each["bound"] in ("exact", "at_least", "at_most", "unknown")
        assert each["against"].endswith("+plain") and not each["against_base"]["against"].endswith("+plain")
        assert (each["num_seeds"], each["num_autoencoders"]) == (2, 2)
        assert each["final_difference"]["method"] == "nested t"
        assert each["samples"]["eq"]["guided"].keys() >= {"fd_efficientnet_lite0", "kd_efficientnet_lite0"}
        assert each["autoencoders"]["control"]["rfd_efficientnet_lite0"] > 0
    assert all(line in text for line in readme_rows(found))
    assert text.count("fewer images |") + text.count("could not be told |") == 2


def row(**changes: Any) -> list[str]:
    found: Mapping[str, Any] = {"speed_up": 1.5, "low": 1.2, "high": 1.9, "bound": "exact"}
    return readme_rows({"sit": {**found, **changes}})


def test_bounds_are_said():
    assert row() == ["| SiT | the control's quality after **1.50 times** (1.20 to 1.90) fewer images |"]
    assert "after less than **1.50 times** (\N{EN DASH} to 1.90)" in row(bound="at_most", low=None)[0]
    assert "after at least **1.50 times** fewer" in row(bound="at_least", low=None, high=None)[0]
    assert row(bound="unknown") == ["| SiT | the speed-up could not be told |"]
    assert readme_rows({"sit": None, "scale": "small"}) == []


def test_shorter_learning_curves_are_lengthened(reproduced, twins: Setting, performed: list[str]):
    reproduced("table9", seeds=1, curve_images=8)
    cut = [name for name in performed if name.startswith("generators/")]
    assert cut and all(read_json(twins.root / name / "config.json")["max_steps"] == 4 for name in cut)
    assert "scores/sit-ti-2/tiny-kl-f2/curve/seed-0-4-steps" in performed
    performed.clear()
    reproduced("table9", seeds=1)
    assert len(performed) == len(set(performed)) == 3 * len(cut)  # all sample sets are of the longer training
    assert set(performed) >= {*cut, "scores/sit-ti-2/tiny-kl-f2/curve/seed-0-8-steps"}
    assert all(read_json(twins.root / name / "config.json")["max_steps"] == 8 for name in cut)
    with pytest.raises(UserError, match=r"--max-steps 8, and now it is 4"):
        reproduced("table9", seeds=1, curve_images=8)
    with pytest.raises(UserError, match="--curve-images is 1. It must be at least a batch, 2"):
        reproduced("table9", curve_images=1)
    with pytest.raises(UserError, match="--curve-images is for --scale small, not tiny"):
        reproduce(ReproduceConfig(items=("table9",), out=twins.root, scale="tiny", curve_images=8))


def test_what_was_fine_tuned_already_is_not_fine_tuned_again(reproduced, twins: Setting, performed: list[str]):
    given = ("tiny-kl-f2+eq=untrained:tiny-kl-f2", "tiny-kl-f2+eq-seed-1=untrained:tiny-kl-f2")
    reproduced("table9", seeds=1, autoencoder=given)
    assert not any(name.startswith("autoencoders/") for name in performed)
    assert read_json(twins.root / "latents/tiny-kl-f2+eq-seed-1/config.json")["autoencoder"] == "untrained:tiny-kl-f2"
    with pytest.raises(UserError, match=r"--autoencoder tiny-kl-f2\+no=... is no fine-tuning of table9"):
        reproduced("table9", autoencoder=("tiny-kl-f2+no=untrained:tiny-kl-f2",))
    with pytest.raises(UserError, match="two autoencoders are called 'mine'"):
        reproduced("table1", autoencoder=("mine=untrained:tiny-kl-f2", "mine=untrained:tiny-kl"))


# Causes ---------------------------------------------------------------------------------------------------------------


def test_each_cause_changes_one_thing(twins: Setting, performed: list[str]):
    table = causes(twins)
    for run in Plan.of(table.runs).runs:
        if run.command in ("finetune", "evaluate", "encode"):
            execution.perform(run)
    rows = {row.label: row.cells["gfid"].runs for row in table.rows}
    assert {label: len(runs) for label, runs in rows.items()} == {
        label: 2 if label == "as it was" else 4 for label in rows
    }
    (low_passed,) = (label for label in rows if label.startswith("spectrum"))
    tunings = [run for run in Plan.of(rows[low_passed]).runs if run.name.startswith("autoencoders/tiny-kl-f2+lowpass")]
    assert [run.name.removeprefix("autoencoders/tiny-kl-f2") for run in tunings] == ["+lowpass", "+lowpass-seed-1"]
    for seed, run in enumerate(tunings):
        measured = read_json(run.spectrum_of.folder / "metrics.json")["spectrum_excess_db"]
        training = run.resolved().training
        assert training.method == training.resolved().method == f"eq + lowpass(excess_db={round(measured, 3):g})"
        assert (training.seed, training.resolved().transform.equivariance_probability) == (seed, 0.0)
        assert run.spectrum_of.name.endswith(("+eq", "+eq-seed-1")[seed])
        run.check_saved()
    from eqvae.paper.cluster import _without_architectures

    for run in Plan.of(table.runs).runs:  # what a cluster is sent says all that the run needs
        sent = _without_architectures(run)
        assert flat(sent.resolved()) == flat(run.resolved())
        assert not any(each.architecture for each in (sent, *sent.needs, sent.deviation_of, sent.spectrum_of) if each)
    assert {row.label for row in table.rows if row.also_against == "EQ-VAE"} == set(rows) - {
        "EQ-VAE", "control: Equation 1", "as it was"
    }  # fmt: skip
    (multiplied,) = (label for label in rows if label.startswith("deviation"))
    for label in (multiplied, "EQ-VAE, times the base's factor"):  # all pretended latents have a deviation of 2.5
        assert {flat(run.resolved())["normalization"] for run in rows[label]} == {"fixed:0.4"}
    assert {flat(run.config)["normalization"] for run in rows["EQ-VAE"]} == {"measured"}
    assert len({run.name for label in rows for run in rows[label]}) == 2 + 7 * 4
    assert {run.name for run in table5(twins).rows[1].cells["gfid"].runs} <= {
        run.name for run in Plan.of(table.runs).runs
    }


def test_what_is_multiplied_has_the_published_factor_where_there_is_one(twins: Setting, performed: list[str]):
    table = causes(replace(twins, fixed_factors={twins.generator_base: 0.18215}))
    for run in Plan.of(table.runs).runs:
        if run.command in ("finetune", "evaluate", "encode"):
            execution.perform(run)
            if run.name.startswith("latents/") and "+eq" in run.name:
                write_json(run.folder / "metrics.json", {"latent_std": 5.0})
    rows = {row.label.partition(":")[0]: row.cells["gfid"].runs for row in table.rows}
    assert {flat(run.resolved())["normalization"] for run in rows["EQ-VAE, times the base's factor"]} == {
        "fixed:0.18215"
    }
    assert {flat(run.resolved())["normalization"] for run in rows["deviation only"]} == {"fixed:0.3643"}  # 5.0 / 2.5


def test_shares_of_the_gain_and_both_comparisons_are_told(twins: Setting, performed: list[str]):
    table = causes(twins)
    for run in Plan.of(table.runs).runs:
        execution.perform(run)
    markdown, record = write_item(table, twins.root)
    rows = {row["label"]: row for row in read_json(record)["rows"]}
    control, ours, scales = (
        rows[label]["figures"]["gfid"]["here"] for label in ("control: Equation 1", "EQ-VAE", "scales only")
    )
    figure = rows["scales only"]["figures"]["gfid"]
    assert figure["share_of_gain"] == pytest.approx((scales - control) / (ours - control))
    assert figure["second_difference"]["difference"] == pytest.approx(scales - ours)
    assert rows["EQ-VAE"]["figures"]["gfid"]["share_of_gain"] is None
    text = markdown.read_text()
    assert "gfd_efficientnet_lite0: scales only against EQ-VAE: " in text
    assert " of control: Equation 1 to EQ-VAE" in text


def test_tokens_are_always_guided(twins: Setting):
    samples = {family: arms["eq"].samples for family, arms in headline(twins).arms.items()}
    assert set(samples["maskgit"]) == {"guided"}
    assert set(samples["sit"]) == {"unguided", "guided"}
