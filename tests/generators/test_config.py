"""What a training configuration fills in, and what it refuses."""

from pathlib import Path

import pytest

from eqvae.errors import UserError
from eqvae.evidence import curves
from eqvae.runs import finetune
from eqvae.runs.train_config import FREE_TO_CHANGE, TrainConfig
from eqvae.runtime.run_folder import check_same_run, flat, from_flat


def configure(recipe: str = "dit-ti-4", **options) -> TrainConfig:
    return from_flat(TrainConfig, recipe=recipe, latents=Path("latents"), out=Path("out"), **options)


@pytest.mark.parametrize(("recipe", "norm"), [("dit-b-2", 0.0), ("sit-b-2", 0.0), ("REPA-SiT-b-2", 1.0)])
def test_published_clipping(recipe: str, norm: float):
    resolved = configure(recipe).resolved()
    assert (resolved.max_grad_norm, resolved.recipe) == (norm, recipe.lower())
    assert configure(recipe, max_grad_norm=0.3).resolved().max_grad_norm == 0.3


def test_published_training_of_maskgit():
    resolved = configure("MaskGIT-b").resolved()
    assert resolved.recipe == "maskgit-b"
    assert (resolved.adam_beta1, resolved.adam_beta2, resolved.weight_decay) == (0.9, 0.96, 1e-5)
    assert (resolved.max_grad_norm, resolved.lr_warmup_steps, resolved.watch_steps) == (1.0, 2500, 8)
    own = {"adam_beta2": 0.9, "weight_decay": 0.0, "max_grad_norm": 0.0, "lr_warmup_steps": 0, "watch_steps": 3}
    changed = configure("maskgit-b", **own).resolved()
    assert {name: getattr(changed, name) for name in own} == own


def test_runs_from_before_maskgit_resume():
    resolved = configure().resolved()
    assert (resolved.adam_beta2, resolved.weight_decay, resolved.lr_warmup_steps) == (0.999, 0.0, 0)
    new = {"schedule", "label_smoothing", "loss_tokens"}
    saved = {name: value for name, value in flat(resolved).items() if name not in new}
    check_same_run(saved, resolved, FREE_TO_CHANGE)


def test_a_run_has_the_fields_of_its_own_family():
    of_dit, of_maskgit = flat(configure("dit-ti-4").resolved()), flat(configure("maskgit-ti").resolved())
    assert of_dit.keys() - of_maskgit.keys() == {"normalization", "posterior", "qk_norm"}
    assert of_maskgit.keys() - of_dit.keys() == {"schedule", "label_smoothing", "loss_tokens"}
    of_sit, of_repa = flat(configure("sit-ti-4").resolved()), flat(configure("repa-sit-ti-4").resolved())
    assert of_sit.keys() - of_dit.keys() == {"path", "prediction", "loss_weight"}
    of_repas_own = {"teacher", "teacher_weights", "cache_teacher", "repa_weight", "repa_depth", "data"}
    assert of_repa.keys() - of_sit.keys() == of_repas_own
    # Before, every run wrote down the fields of all families; such a run resumes.
    of_gat = flat(configure("gat-ti-4").resolved())
    assert of_gat.keys() - of_maskgit.keys() == {
        "normalization", "posterior", "r1_weight", "r2_weight", "penalty_every", "augment",
    }  # fmt: skip
    everything = of_dit | of_maskgit | of_sit | of_repa
    for recipe in ("dit-ti-4", "sit-ti-4", "repa-sit-ti-4", "maskgit-ti"):
        resolved = configure(recipe).resolved()
        check_same_run(everything | flat(resolved), resolved, FREE_TO_CHANGE)


def test_resolving_twice_changes_nothing():
    resolved = configure(max_steps=25).resolved()
    assert resolved.sample_every == 2
    assert resolved.resolved() == resolved
    assert configure(max_steps=3).resolved().sample_every == 1


def test_the_published_sampler_is_one_measure_said_or_not():
    assert configure(recipe="sit-ti-2", watch_sampler="sde").resolved().watch_sampler is None
    assert configure(recipe="sit-ti-2", watch_sampler="heun").resolved().watch_sampler == "heun"


@pytest.mark.parametrize(
    ("options", "what"),
    [({"batch_size": 0}, "--batch-size is 0"), ({"learning_rate": 0.0}, "--learning-rate is 0"),
     ({"ema_decay": 1.0}, "--ema-decay is 1"), ({"label_dropout": 1.5}, "--label-dropout is 1.5"),
     ({"learning_rate": float("nan")}, "--learning-rate is nan"), ({"seed": -1}, "--seed is -1"),
     ({"max_grad_norm": -1.0}, "--max-grad-norm"), ({"sample_every": 0}, "--sample-every"),
     ({"watch_steps": 1}, "--watch-steps is 1. It must be in 2 ... 1000"), ({"watch_steps": 1001}, "--watch-steps"),
     ({"watch_sampler": "heun"}, "--watch-sampler heun is not for 'dit-ti-4'. Use ddpm or ddim"),
     ({"reference": "x", "num_watch_samples": 1}, "--num-watch-samples is 1"),
     ({"path": "gvp"}, "--path gvp is SiT's"), ({"prediction": "noise"}, "train a SiT"),
     ({"teacher": "efficientnet-lite0"}, "--teacher efficientnet-lite0 is REPA's, and 'dit-ti-4' is no REPA"),
     ({"schedule": "cosine"}, "--schedule cosine is MaskGIT's, and 'dit-ti-4'"),
     ({"recipe": "maskgit-ti", "repa_weight": 1.0}, "--repa-weight 1.0 is REPA's, and 'maskgit-ti' is no REPA"),
     ({"recipe": "maskgit-ti", "path": "gvp"}, "--path gvp is SiT's"),
     ({"recipe": "maskgit-ti", "posterior": "mean"}, "--posterior mean is DiT, SiT or GAT's"),
     ({"recipe": "maskgit-ti", "label_smoothing": 1.0}, "--label-smoothing is 1.0"),
     ({"recipe": "maskgit-tu"}, "Did you mean 'maskgit-ti'"),
     ({"recipe": "dit-ti-3"}, "Did you mean 'dit-ti-"), ({"recipe": "unet"}, "there is no generator 'unet'")],
)  # fmt: skip
def test_refused_values(options: dict, what: str):
    with pytest.raises(UserError, match=what.replace("-", "[-]")):
        configure(**options).resolved()


def test_what_a_resumption_may_change_makes_no_arm_of_its_own():
    of_fine_tuning = finetune.FREE_TO_CHANGE - {"max_steps", "polish_steps"}
    assert FREE_TO_CHANGE <= curves.FREE
    assert of_fine_tuning <= curves._FREE_FOR_TWINS
