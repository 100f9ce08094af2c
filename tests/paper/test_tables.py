"""What the tables plan: complete configurations, equal names for equal runs, one of each that they share."""

from dataclasses import replace
from pathlib import Path

import pytest

from eqvae.errors import UserError
from eqvae.paper import expected
from eqvae.paper.arms import Arm, equivariant, explicit, latents, more_training
from eqvae.paper.figures import FIGURES, watched_steps
from eqvae.paper.plan import Plan, PlannedRun, describe_base
from eqvae.paper.setting import Family, Setting, Size
from eqvae.paper.settings import PAPER, SMALL, TINY
from eqvae.paper.tables import TABLES, table1, table2, table4, table5, table7, table8, table9, table11
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import change_flat, flat, flat_value

every = pytest.mark.parametrize("scale", [PAPER, SMALL, TINY], ids=["paper", "small", "tiny"])


def plan_of(scale: Setting, *names: str) -> Plan:
    known = {**TABLES, **FIGURES}
    return Plan.of(run for name in names or known for run in known[name](scale).runs)


@every
def test_everything_can_be_planned(scale: Setting):
    plan = plan_of(scale)
    names = [run.name for run in plan.runs]
    assert len(set(names)) == len(names)
    for place, run in enumerate(plan.runs):
        assert run.folder == scale.root / run.name
        assert all(need.name in names[:place] for need in run.needs)
        if isinstance(run.config, TrainConfig | FinetuneConfig):
            run.config.resolved()  # what can be checked without data is right
        if isinstance(run.config, FinetuneConfig):
            smallest = run.config.training.transform.sampler().smallest_side(run.config.image_size)
            assert run.config.training.adversarial.adversarial_weight == 0 or smallest >= 24


@every
def test_no_run_lies_in_another(scale: Setting):
    folders = {run.folder for run in plan_of(scale).runs}
    assert not [folder for folder in folders if folders & set(folder.parents)]


@every
@pytest.mark.parametrize("name", TABLES)
def test_rows_are_the_papers(scale: Setting, name: str):
    table = TABLES[name](scale)
    paper = getattr(expected, name.replace("table", "TABLE_"))
    assert [row.label for row in table.rows] == list(paper.rows)
    for row in table.rows:
        assert row.expected == paper.rows[row.label]
        assert not row.against or row.against in paper.rows
        assert set(row.cells) <= {column.key for column in table.columns}
        assert bool(row.cells) == bool(row.here)


def test_tables_share_runs():
    plan = plan_of(TINY, "table5", "table6", "table7", "table8", "figure5")
    caches = [run for run in plan.runs if isinstance(run.config, EncodeConfig)]
    assert len(caches) == len({run.config.autoencoder for run in caches})
    alone = [plan_of(TINY, name) for name in ("table5", "table6")]
    shared = {run.name for run in alone[0].runs} & {run.name for run in alone[1].runs}
    assert {"latents/tiny-kl", "evaluations/tiny-kl", "autoencoders/tiny-kl+eq", "reference"} <= shared
    assert {f"generators/dit-ti-2/tiny-kl/{kind}seed-{seed}" for kind in ("", "fixed/") for seed in range(3)} <= shared


def test_table_5_is_about_tau():
    tuned = {run.name: run.config for run in plan_of(TINY, "table5").runs if isinstance(run.config, FinetuneConfig)}
    samplers = {name.partition("+")[2]: config.training.transform.sampler() for name, config in tuned.items()}
    assert {name: (each.scale, each.rotation_probability) for name, each in samplers.items()} == {
        "rotation": ("none", 1.0), "scale": ("isotropic", 0.0), "eq": ("isotropic", 1.0),
        "anisotropic": ("anisotropic", 1.0),
    }  # fmt: skip
    assert {each.equivariance_probability for each in samplers.values()} == {0.5}
    first = next(iter(tuned.values()))
    same = {change_flat(config, out=first.out, transforms=flat_value(first, "transforms")) for config in tuned.values()}
    assert same == {first}


def test_ablations_change_what_they_are_about(setting: Setting):
    base = "tiny-kl-f2"
    ours = equivariant(setting, base).run.config
    plain, collapsing = more_training(setting, base).run.config, explicit(setting, base, stop_gradient=True).run.config
    transforms = [each.training.transform.sampler() for each in (ours, plain, collapsing)]
    assert transforms[1].equivariance_probability == 0.0
    assert (plain.training.max_steps, plain.training.objective) == (ours.training.max_steps, "implicit")
    assert (collapsing.training.objective, collapsing.training.explicit_weight) == ("explicit-stop-gradient", 0.1)
    assert transforms[0] == transforms[2]
    assert equivariant(setting, base, probability=0.5, epochs=setting.epochs) == equivariant(setting, base)
    configs = [row.cells["rfid"].runs[0].needs[0].config for row in table8(setting).rows]
    strengths = [flat_value(config, "equivariance_probability") for config in configs]
    assert strengths == [0.3, 0.5, 0.7]
    assert equivariant(setting, base, epochs=1).run.config.training.max_steps == setting.steps_per_epoch
    assert equivariant(setting, "tiny-vq-f4").run.config.training.codes.codebook == "ema"


def test_both_normalizations_stand_side_by_side(setting: Setting):
    ours = table5(setting).rows[3]
    measured, fixed = ours.cells["gfid"].runs[0], ours.cells["gfid_fixed"].runs[0]
    assert flat(measured.config)["normalization"] == "measured"
    assert fixed.scaled_as == latents(setting, setting.base("tiny-kl-f2"))
    assert fixed.scaled_as in fixed.needs
    assert replace(fixed.config, out=measured.folder) == measured.config


def fixed_run(scale: Setting, base: str) -> PlannedRun:
    """The first generator on EQ-VAE's latents, scaled as the base's."""
    arm = Arm(setting=scale, family="dit", size="b", autoencoder=equivariant(scale, base), is_fixed=True)
    return arm.trained[0]


def test_the_bases_factor_is_read_from_its_cache(setting: Setting):
    from eqvae.artifacts.files import write_json

    ours = fixed_run(setting, "tiny-kl-f2")
    with pytest.raises(UserError, match="does not exist"):
        ours.resolved()
    write_json(setting.root / "latents" / "tiny-kl-f2" / "metrics.json", {"latent_std": 4.0})
    assert ours.resolved() == change_flat(ours.config, normalization="fixed:0.25")
    assert flat(fixed_run(PAPER, "sd-vae").resolved())["normalization"] == "fixed:0.18215"
    tokens = table1(setting).rows[-2].cells
    assert "gfid_fixed" not in tokens


def test_patches_keep_the_number_of_tokens():
    def recipe(scale: Setting, family: Family, size: Size, stride: int) -> str:
        autoencoder = replace(scale.base("sd-vae"), stride=stride)
        return Arm(setting=scale, family=family, size=size, autoencoder=autoencoder).recipe

    assert recipe(PAPER, "dit", "b", 8) == "dit-b-2"
    assert recipe(PAPER, "dit", "b", 16) == "dit-b-1"
    assert recipe(PAPER, "repa-sit", "xl", 8) == "repa-sit-xl-2"
    assert recipe(TINY, "sit", "xl", 8) == "sit-ti-2"
    assert recipe(TINY, "dit", "b", 32) == "dit-ti-1"
    assert recipe(PAPER, "maskgit", "xl", 16) == "maskgit-b"


def test_published_baselines_are_on_their_own_autoencoder():
    labels = {row.label: row for row in table2(PAPER).rows}
    assert labels["DiT-B/2, 400K"].here == "dit-b-2 on sd-vae-ft-ema"
    assert labels["DiT-B/2 + EQ-VAE, 400K"].here == "dit-b-2 on sd-vae+eq"
    (long,) = labels["DiT-XL/2 + EQ-VAE, 1.5M"].cells["gfid"].runs
    assert long.config.max_steps == 1_500_000
    guided = {row.label: row for row in table4(PAPER).rows}
    assert guided["DiT-XL/2 (SD-VAE), 1400 epochs"].here == "dit-xl-2 on sd-vae, guided"
    assert not guided["LDM, 200 epochs"].cells
    (drawn,) = (need for need in guided["REPA, 800 epochs"].cells["fid"].runs[0].needs if need.command == "sample")
    assert (drawn.config.guidance_scale, drawn.config.guidance_high, drawn.config.num_samples) == (1.8, 0.7, 50_000)


def test_one_tiny_generator_stands_once():
    here = [row.here for row in table2(TINY).rows if row.here]
    assert len(here) == len(set(here)) == 6
    assert "repa-sit-ti-2 on tiny-kl+eq" in here


def test_rows_over_steps_are_watched():
    rows = {row.label: row for row in table9(PAPER).rows}
    assert rows["DiT-XL/2 + EQ-VAE, 50K"].cells["fid"].step == 50_000
    assert set(rows["DiT-XL/2 + EQ-VAE, 400K"].cells) == {"fid", "sfid", "inception_score", "precision", "recall"}
    tiny = {row.label: row for row in table9(TINY).rows}
    assert not tiny["SiT-XL/2 + EQ-VAE, 100K"].cells
    assert tiny["SiT-XL/2 + EQ-VAE, 200K"].cells["fid"].step == TINY.training["sit"].max_steps // 2
    masked = {row.label: row for row in table11(PAPER).rows}
    assert masked["MaskGIT + EQ-VAE, 130 epochs"].cells["fid_watch"].step == 130 * 5005
    assert watched_steps(PAPER, "dit") == (50_000, 100_000, 400_000)
    last = TINY.training["dit"].max_steps
    assert watched_steps(TINY, "dit") == (last // 2, last)


def test_without_inception_nothing_is_called_fid():
    for recipe in TABLES.values():
        for column in recipe(TINY).columns:
            assert "fid" not in column.here.replace("sfid", "")
    assert table7(PAPER).columns[0].here == "gfid"


def test_further_autoencoders_get_rows(setting: Setting):
    more = replace(
        setting, bases={**setting.bases, "mine": describe_base("mine", "untrained:tiny-kl")}, extra=("mine",)
    )
    row = table1(more).rows[-1]
    assert (row.label, row.expected) == ("mine", {})
    assert row.cells["gfid"].runs[0].name == "generators/dit-ti-1/mine/seed-0"


def test_different_runs_of_one_name():
    config = EncodeConfig(autoencoder="a", data="d", out=Path("latents/x"))
    one = PlannedRun(command="encode", name="latents/x", config=config)
    other = replace(one, config=replace(config, data="e"))
    assert Plan.of([one, one, replace(one)]).runs == (one,)
    with pytest.raises(UserError, match="two different runs called 'latents/x'"):
        Plan.of([one, other])


def test_data_follow_one_another():
    unsaid = {"finetune_data": None, "validation_data": None}
    changed = TINY.with_data(data="train.parquet", reference_data="test.parquet", **unsaid)
    assert {changed.finetuning.data, changed.discrete_finetuning.data, changed.encoding.data} == {"train.parquet"}
    assert {changed.finetuning.validation_data, changed.evaluation.data, changed.reference.reference} == {
        "test.parquet"
    }
    paper = PAPER.with_data(data="imagenet", reference_data="adm.npz", finetune_data="openimages", validation_data=None)
    assert (paper.finetuning.data, paper.encoding.data) == ("openimages", "imagenet")
    assert paper.evaluation.data == PAPER.evaluation.data
