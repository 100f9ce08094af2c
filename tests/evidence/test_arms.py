"""Training runs read from their folders, and gathered into arms."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eqvae.artifacts.files import read_json, write_json
from eqvae.errors import UserError
from eqvae.evidence.arms import compare_arms, read_arms, recipes_own_fields
from eqvae.evidence.curves import read_curve

Q = "fd_efficientnet_lite0"


def names(*folders: Path) -> list[str]:
    return [arm.name for arm in read_arms(folders)]


# One run --------------------------------------------------------------------------------------------------------------


def test_a_curve_is_what_the_validations_say(write_run):
    curve = read_curve(write_run("run", [9.0, 6.0, 5.0], seed=3))
    assert curve.seed == 3
    assert curve.num_images.tolist() == [40, 80, 120]
    assert curve.training_sec.tolist() == [5.0, 10.0, 15.0]
    assert curve.values.tolist() == [9.0, 6.0, 5.0]
    assert (curve.measure["metric"], curve.measure["num_samples"], curve.measure["image_size_px"]) == (Q, 50, 32)
    assert curve.is_finished
    assert not read_curve(write_run("half", [9.0], max_steps=400)).is_finished


def test_a_journal_after_a_resumption_and_a_kill(write_run):
    """The later of two records of one step counts; contact sheets without a distance and torn lines don't."""
    folder = write_run("run", [9.0, 6.0])
    with (folder / "journal.jsonl").open("a") as journal:
        again = {"kind": "validation", "step": 20, "training_sec": 11.0, Q: 5.5, "num_samples": 50}
        sheet = {"kind": "validation", "step": 30, "training_sec": 15.0}
        broken = {"kind": "validation", "step": 40, "training_sec": 20.0, Q: float("nan"), "num_samples": 50}
        journal.write("".join(json.dumps(record) + "\n" for record in (again, sheet, broken)) + '{"kind": "valid')
    curve = read_curve(folder)
    assert curve.values.tolist() == [9.0, 5.5]
    assert curve.training_sec.tolist() == [5.0, 11.0]


def test_fid_has_its_own_key(write_run):
    folder = write_run("run", features="inception")
    path = folder / "journal.jsonl"
    path.write_text(path.read_text().replace(Q, "fid"))
    assert read_curve(folder).measure["metric"] == "fid"


def test_a_run_without_its_weights_is_named_after_its_latents(write_run):
    folders = [write_run("a"), write_run("b", autoencoder="tiny-kl-eq")]
    shutil.rmtree(folders[1] / "generator")
    (folders[1] / "environment.json").unlink()
    assert names(*folders) == ["dit-ti-2 on tiny-kl", "dit-ti-2 on tiny-kl-eq"]


def test_refused_folders(write_run, tmp_path: Path):
    def says(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_curve(folder)
        return str(caught.value)

    assert "does not exist" in says(tmp_path / "nowhere")
    write_json(tmp_path / "evaluation" / "config.json", {"command": "evaluate"})
    assert "was written by 'eqvae evaluate'. Name folders of 'eqvae train'" in says(tmp_path / "evaluation")
    write_json(tmp_path / "other" / "config.json", {})
    assert "is no training run" in says(tmp_path / "other")
    assert "Is this a folder that an eqvae command wrote?" in says(tmp_path)
    unwatched = write_run("unwatched", [])
    assert "Train with --reference" in says(unwatched)
    (unwatched / "journal.jsonl").unlink()
    assert "Train with --reference" in says(unwatched)
    assert "batch_size" in says(write_run("broken", batch_size=None))
    mixed = write_run("mixed")
    with (mixed / "journal.jsonl").open("a") as journal:
        more = {"kind": "validation", "step": 90, "training_sec": 90.0, Q: 5.0, "num_samples": 1000}
        journal.write(json.dumps(more) + "\n")
    assert "different numbers of samples (1000, 50)" in says(mixed)
    path = write_run("two") / "journal.jsonl"
    path.write_text(path.read_text().replace(Q, "fid", 1))
    assert f"different distances ({Q}, fid)" in says(path.parent)


# Arms -----------------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_an_arm(write_run):
    first = write_run("first", seed=2)
    other = write_run("other", seed=0, autoencoder="tiny-kl-eq")
    second = write_run("second", seed=1, out="elsewhere", device="cuda", max_steps=500, log_every=7, compile=True)
    base, arm = read_arms([first, other, second])
    assert (base.name, arm.name) == ("dit-ti-2 on tiny-kl", "dit-ti-2 on tiny-kl-eq")
    assert (base.seeds, arm.seeds) == ((1, 2), (0,))
    assert [run.folder for run in base.runs] == [second, first]


def test_the_same_autoencoder_elsewhere_is_the_same_arm(write_run):
    copied = write_run(
        "copied", seed=1, autoencoder="models/tiny-kl/autoencoder", latents_fingerprint="digest of tiny-kl"
    )
    arms = read_arms([write_run("run"), copied, write_run("eq", autoencoder="tiny-kl-eq")])
    assert [arm.seeds for arm in arms] == [(0, 1), (0,)]
    again = write_run("again", seed=2, latents_digest="another machine's rounding", reference_moments="images")
    assert len(read_arms([write_run("older"), again, write_run("other", autoencoder="eq")])) == 2


def test_names_say_what_differs(write_run):
    base = write_run("base")
    fixed = write_run("fixed", normalization="fixed:0.5", learning_rate=0.001)
    assert names(base, fixed) == [
        "dit-ti-2 on tiny-kl, learning rate 0.0001, normalization measured",
        "dit-ti-2 on tiny-kl, learning rate 0.001, normalization fixed:0.5",
    ]
    eq = write_run("eq", autoencoder="runs/tiny-kl-eq/autoencoder")
    assert names(base, eq) == ["dit-ti-2 on tiny-kl", "dit-ti-2 on tiny-kl-eq"]
    other = write_run("other", autoencoder="elsewhere/tiny-kl-eq/autoencoder", latents_fingerprint="0123456789abcdef")
    assert names(eq, other) == ["dit-ti-2 on tiny-kl-eq (digest o)", "dit-ti-2 on tiny-kl-eq (01234567)"]


def test_what_only_recipes_differ_in_is_not_in_the_name(write_run):
    folders = [write_run("dit", max_grad_norm=0.0), write_run("repa", recipe="repa-sit-ti-2", max_grad_norm=1.0)]
    arms = read_arms(folders)
    assert [arm.name for arm in arms] == ["dit-ti-2 on tiny-kl", "repa-sit-ti-2 on tiny-kl"]
    assert recipes_own_fields([arm.runs[0] for arm in arms]) == {"max_grad_norm": [0.0, 1.0]}
    clipped = write_run("clipped", max_grad_norm=1.0)
    assert names(*folders, clipped)[2] == "dit-ti-2 on tiny-kl, max grad norm 1"


def test_the_mean_goes_as_far_as_all_seeds(write_run):
    whole, half = write_run("whole", [9.0, 6.0, 5.0]), write_run("half", [7.0, 4.0], seed=1, sec_per_step=1.5)
    other = write_run("other", autoencoder="eq")
    arm = read_arms([whole, half, other])[0]
    assert arm.num_images.tolist() == [40, 80]
    np.testing.assert_allclose(arm.by_images().mean().values, [[8.0, 5.0]])
    np.testing.assert_allclose(arm.by_time().mean().positions, [[10.0, 20.0]])
    apart = write_run("apart", [7.0], seed=1, every=7)
    with pytest.raises(UserError, match="not measured after the same steps"):
        read_arms([whole, apart, other])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference": "other"}, "reference photos and other"),
        ({"features": "inception"}, "features efficientnet-lite0 and inception"),
        ({"num_watch_samples": 51}, "num_watch_samples 50 and 51"),
        ({"watch_steps": 9}, "watch_steps 8 and 9"),
        ({"watch_sampler": "heun"}, "watch_sampler None and heun"),
    ],
)
def test_curves_that_were_measured_differently_are_refused(write_run, change: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        read_arms([write_run("a"), write_run("b", autoencoder="eq", **change)])


def test_one_pass_agrees_with_any_number_of_steps(write_run):
    gan = write_run("gan", recipe="gat-ti-2", watch_steps=1)
    sit, other = write_run("sit", recipe="sit-ti-2"), write_run("other", recipe="sit-ti-2", watch_steps=9)
    for folders in ([gan, sit], [sit, gan]):
        comparison = compare_arms(read_arms(folders))
        assert comparison.measure["watch_steps"] == 8
    with pytest.raises(UserError, match="watch_steps 8 and 9"):
        read_arms([gan, sit, other])


@pytest.mark.parametrize(
    ("old", "new", "said"), [(Q, "fid", "metric"), ('_samples": 50', '_samples": 60', "50 and 60")]
)
def test_what_the_journals_say_must_agree_too(write_run, old: str, new: str, said: str):
    folders = [write_run("a"), write_run("b", autoencoder="eq")]
    path = folders[1] / "journal.jsonl"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        read_arms(folders)


def test_refused_sets_of_runs(write_run, tmp_path: Path):
    base, second, eq = write_run("base"), write_run("second", seed=1), write_run("eq", autoencoder="eq")

    def says(*folders: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_arms(folders)
        return str(caught.value)

    assert "the runs given make one" in says(base, second)
    assert "the runs given make one" in says(base)
    assert "the runs given make none" in says()
    (tmp_path / "link").symlink_to(base)
    assert "is given twice" in says(base, eq, tmp_path / "link")
    twin = write_run("twin", max_steps=999)
    assert "are the same run: equal settings and seed 0" in says(base, eq, twin)
    card = second / "generator" / "generator.json"
    write_json(card, read_json(card) | {"scale": [1.5]})
    assert "different latents of one autoencoder" in says(base, eq, second)
    write_json(card, read_json(card) | {"image_size_px": 64})
    assert "image_size_px 32 and 64" in says(base, eq, second)


# Autoencoders that differ in their seed -------------------------------------------------------------------------------


def write_card(folder: Path, *, seed: int, base: str = "taesd", **recipe: Any) -> str:
    """Write the card of a fine-tuned autoencoder, and return where it is."""
    fields = {"command": "finetune", "seed": seed, "out": str(folder), "transforms": "paper", "max_steps": 8} | recipe
    card = {"base": base, "base_fingerprint": f"digest of {base}", "num_steps": 8, "recipe": fields}
    write_json(folder / "autoencoder" / "eqvae.json", card)
    return str(folder)


def test_autoencoders_of_one_recipe_are_one_arm(write_run, tmp_path: Path):
    base = [write_run(f"base-{seed}", [9.0, 6.0, 5.0], seed=seed, autoencoder="taesd") for seed in range(2)]
    twins = [write_card(tmp_path / f"eq-{seed}", seed=seed, device=f"cuda:{seed}") for seed in range(2)]
    other = write_card(tmp_path / "strong", seed=0, transforms="rotation")
    ours = [
        write_run(f"run-{place}-{seed}", [6.0 - place, 4.0, 3.0], seed=seed, autoencoder=twin)
        for place, twin in enumerate(twins) for seed in range(2)
    ]  # fmt: skip
    arms = read_arms([*base, *ours, write_run("strong-run", autoencoder=other)])
    assert [arm.name for arm in arms] == ["dit-ti-2 on taesd", "dit-ti-2 on eq-0", "dit-ti-2 on strong"]
    assert [arm.num_autoencoders for arm in arms] == [1, 2, 1]
    assert arms[1].replicates == (((0,), 0), ((0,), 1), ((1,), 0), ((1,), 1))
    np.testing.assert_allclose(arms[1].by_images().mean().values, [[5.5, 4.0, 3.0]])
    (found,) = compare_arms(arms[:2]).comparisons
    assert found.num_resamples == 0
    assert (found.final.method, found.final.num_autoencoders, found.final.num_seeds) == ("nested t", 2, 2)
    said = "strong is one fine-tuning: how far another would lie is in no interval against it"
    assert [said in " ".join(compare_arms(some).notes) for some in (arms, arms[:2])] == [True, False]
    images = found.in_images
    assert (images.seed_range.low, images.seed_range.high) == pytest.approx((120 / 40 / 2**0.5, 3.0))
    assert images.interval.low < images.ratio < images.interval.high  # two autoencoders: one degree of freedom
    with pytest.raises(UserError, match="are the same run"):
        read_arms([*base, *ours, write_run("again", seed=1, autoencoder=twins[1])])


def test_twins_that_were_polished_are_twins(write_run, tmp_path: Path):
    first = [write_card(tmp_path / f"eq-{seed}", seed=seed) for seed in range(2)]
    polished = [write_card(tmp_path / f"polished-{seed}", seed=0, base=twin) for seed, twin in enumerate(first)]
    runs = [write_run(f"run-{place}", autoencoder=twin) for place, twin in enumerate(polished)]
    arms = read_arms([write_run("base"), *runs])
    assert arms[1].replicates == (((0, 0), 0), ((1, 0), 0))
    again = [write_run("unpolished", autoencoder=first[0]), *runs]
    assert len(read_arms(again)) == 2
    write_card(tmp_path / "eq-0", seed=0, base=first[0])  # a card that names itself
    assert len(read_arms(again)) == 3
