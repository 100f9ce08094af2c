"""Estimates of cost against arithmetic by hand and published figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqvae.generators.families import find_recipe
from eqvae.generators.recipes import PUBLISHED_LATENTS, SIZES
from eqvae.paper.arms import Arm, equivariant, evaluation, explicit, latents, more_training, reference
from eqvae.paper.costs import Cost, coding_flops, describe_plan, estimate, generator_size, network_flops
from eqvae.paper.plan import Plan, PlannedRun
from eqvae.paper.setting import Family, Setting
from eqvae.paper.settings import PAPER
from eqvae.runtime.run_folder import change_flat

# A paper's scale whose networks are counted sooner, with latents of the same shape as SD-VAE's.
SCALE = replace(
    PAPER,
    autoencoders={"SD-VAE": "tiny-kl", "VQ-GAN": "tiny-vq"}, generator_base="tiny-kl",
    sizes={"b": "ti", "xl": "ti", "maskgit": "ti"},
    training={**PAPER.training, "repa-sit": change_flat(PAPER.training["repa-sit"], repa_depth=None)},
)  # fmt: skip
ENCODE, DECODE = coding_flops("tiny-kl", 256)
INCEPTION = network_flops("inception")
HARDLY_ELSE = {"max_steps": 1000, "num_validation_images": 1, "num_statistics_images": 1}
"""Of fine-tuning: hardly anything besides its steps."""


def changed(run: PlannedRun, **changes: Any) -> PlannedRun:
    return replace(run, config=change_flat(run.config, **changes))


def trained(family: Family, **changes: Any) -> PlannedRun:
    arm = Arm(setting=SCALE, family=family, size="xl", autoencoder=SCALE.base("tiny-kl"))
    return changed(arm.trained[0], **changes)


@pytest.mark.parametrize("size", ["s", "b", "xl"])
def test_transformers_cost_what_was_published(size: str) -> None:
    """Table 4 of arXiv:2212.09748: 6.06, 23.01 and 118.64 Gflops for DiT-S/2, -B/2 and -XL/2, a pair counted as one."""
    flops, num_parameters = generator_size(find_recipe(f"dit-{size}-2"), PUBLISHED_LATENTS)
    assert flops / 2e9 == pytest.approx(SIZES[size].gflops, rel=0.001)
    assert num_parameters == SIZES[size].num_parameters


def test_networks_cost_what_was_published() -> None:
    """5.7 billion pairs for Inception-v3, 0.4 for EfficientNet-Lite0, 15.3 for VGG16's convolutions, by torchvision and
    TensorFlow's model zoo; DINOv2's ViT-B/14 at 224 px by arithmetic."""
    assert pytest.approx(5.7, rel=0.02) == INCEPTION / 2e9
    assert network_flops("efficientnet-lite0") / 2e9 == pytest.approx(0.4, rel=0.05)
    assert network_flops("lpips", 224) / 2e9 == pytest.approx(15.35, rel=0.01)
    tokens, width = 257, 768
    pairs = 12 * (12 * tokens * width**2 + 2 * tokens**2 * width) + 256 * 3 * 14**2 * width
    assert network_flops("vit_base_patch14_dinov2.lvd142m", 224) / 2 == pytest.approx(pairs, rel=0.001)


def test_training_is_three_forward_passes_of_all_that_it_sees() -> None:
    forward, num_parameters = generator_size(find_recipe("sit-ti-2"), PUBLISHED_LATENTS)
    cost = estimate(trained("sit", max_steps=1000, sample_every=500, num_watch_samples=300), SCALE)
    # Two watches: 300 samples and a sheet of 100, of 250 steps each.
    assert cost.bf16_flops == pytest.approx(1000 * 256 * 3 * forward + 2 * 400 * 250 * forward)
    assert cost.fp32_flops == pytest.approx(2 * 400 * DECODE + 2 * 300 * INCEPTION)
    # Raw weights, average and two moments in the checkpoint, weights and average exported, of four bytes each.
    assert cost.disk_bytes == 24 * num_parameters


def test_repa_adds_its_teacher_and_projector() -> None:
    sit, repa = (estimate(trained(family, max_steps=1000, sample_every=1000), SCALE) for family in ("sit", "repa-sit"))
    # Three layers on 256 tokens, forward and backward.
    projector = 192 * 2048 + 2048**2 + 2048 * 768
    teacher = network_flops("vit_base_patch14_dinov2.lvd142m", 224)
    added = 256_000 * (teacher + 3 * 2 * 256 * projector)
    # Besides, SiT's published network puts out twice as many channels as it learns.
    assert repa.bf16_flops - sit.bf16_flops == pytest.approx(added, rel=0.01)
    assert repa.disk_bytes - sit.disk_bytes == pytest.approx(24 * projector, rel=0.01)


def test_guided_steps_count_twice() -> None:
    arm = Arm(setting=SCALE, family="repa-sit", size="xl", autoencoder=SCALE.base("tiny-kl"))
    forward, _ = generator_size(find_recipe("repa-sit-ti-2"), PUBLISHED_LATENTS)
    plain, guided = (arm.scored(guided=guided)[0] for guided in (False, True))
    costs = [estimate(next(need for need in run.needs if need.command == "sample"), SCALE) for run in (plain, guided)]
    assert costs[0].bf16_flops == pytest.approx(50_000 * 250 * forward)
    assert costs[1].bf16_flops == pytest.approx(50_000 * 250 * 1.7 * forward)  # REPA guides where noise is below 0.7
    assert costs[0].fp32_flops == pytest.approx(50_000 * DECODE)
    assert costs[0].disk_bytes == 50_000 * (3 * 256**2 + 8)
    assert estimate(plain, SCALE) == Cost(fp32_flops=50_000 * INCEPTION)


def test_a_cache_holds_two_moments_of_images_and_mirror_images() -> None:
    cost = estimate(latents(SCALE, SCALE.base("tiny-kl")), SCALE)
    assert cost.bf16_flops == pytest.approx(1_281_167 * 2 * ENCODE)
    assert cost.disk_bytes == 1_281_167 * 2 * 2 * (4 * 32 * 32) * 2
    tokens = latents(SCALE, SCALE.base("tiny-vq"))
    cells = 256 // SCALE.base("tiny-vq").stride
    assert estimate(tokens, SCALE).disk_bytes == 1_281_167 * 2 * cells**2 * 2


def test_an_evaluation_transforms_everything() -> None:
    cost = estimate(changed(evaluation(SCALE, SCALE.base("tiny-kl")), num_images=1000), SCALE)
    transformed = 3 + 1 / 16 + 1 / 4 + 9 / 16  # three rotations, and scales of 1/4, 1/2 and 3/4
    coded = ENCODE * (1 + transformed) + DECODE * (1 + transformed) + DECODE  # the last between latents
    seen = 2 + 2 * 6 + 1
    assert cost.bf16_flops + cost.fp32_flops == pytest.approx(
        1000 * (coded + seen * INCEPTION + 2 * network_flops("lpips", 256))
    )


def test_a_plain_step_of_fine_tuning() -> None:
    run = more_training(SCALE, "tiny-kl").run
    assert run is not None
    cost = estimate(changed(run, **HARDLY_ELSE), SCALE)
    step = ENCODE + DECODE + network_flops("lpips", 256)
    assert cost.bf16_flops == pytest.approx(1000 * 160 * 3 * step, rel=1e-4)


def test_scaled_images_count_by_their_area() -> None:
    """The mean of s^2 for s uniform in [0.25, 1) is 7/16; cells are snapped down, by half of one in the mean."""
    implicit = equivariant(SCALE, "tiny-kl", probability=1.0).run
    beside = explicit(SCALE, "tiny-kl", stop_gradient=False).run
    assert implicit is not None and beside is not None
    area = 7 / 16 - 0.5 * (1 + 0.25) / 32
    after_encoder = DECODE + network_flops("lpips", 256)
    steps = [
        estimate(changed(run, **HARDLY_ELSE), SCALE).bf16_flops / (1000 * 160 * 3) for run in (implicit, beside)
    ]  # fmt: skip
    assert steps[0] == pytest.approx(ENCODE + area * after_encoder, rel=0.05)
    assert steps[1] == pytest.approx((1 + 0.5 * area) * ENCODE + after_encoder, rel=0.05)


def test_a_reference_keeps_features_and_their_covariance() -> None:
    cost = estimate(reference(SCALE), SCALE)
    assert cost == Cost(fp32_flops=10_000 * INCEPTION, disk_bytes=4 * 10_000 * 2048 + 8 * 2048**2)


def test_hours_are_operations_over_what_a_device_reaches() -> None:
    assert Cost(bf16_flops=989.4e12 * 0.3 * 3600).hours("h100") == pytest.approx(1.0)
    assert Cost(bf16_flops=1.37e12 * 0.12 * 3600, fp32_flops=0.46e12 * 0.12 * 7200).hours("cpu") == pytest.approx(3.0)
    assert Cost(bf16_flops=1e12, disk_bytes=2_500_000).show("h100") == ("1.00e+12", "9.36e-07", "2.5 MB")


def test_sums_of_what_is_left_and_of_all(setting: Setting) -> None:
    arm = Arm(setting=setting, family="dit", size="b", autoencoder=setting.base("tiny-kl-f2"))
    plan = Plan.of(arm.trained)
    done = plan.runs[0]
    done.folder.mkdir(parents=True)
    (done.folder / "metrics.json").write_text("{}")
    lines = describe_plan(plan, {"mine": arm.trained}, setting, "cpu").splitlines()
    costs = [estimate(run, setting) for run in plan.runs]
    assert lines[-2].split() == ["3", "runs", "to", "do", *" ".join(sum(costs[1:], Cost()).show("cpu")).split()]
    assert lines[-1].split() == ["all", "4", "runs", *" ".join(sum(costs, Cost()).show("cpu")).split()]
    assert [line.split()[2] for line in lines[1:5]] == ["done", "to", "to", "to"]


def test_neither_weights_nor_network_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("weights or network")

    for name in ("socket.socket", "torch.load", "torch.nn.Module.load_state_dict", "safetensors.safe_open"):
        monkeypatch.setattr(name, forbidden)
    for counted in (network_flops, coding_flops):
        counted.cache_clear()
    runs = Plan.of([trained("repa-sit"), evaluation(SCALE, equivariant(SCALE, "tiny-kl"))]).runs
    assert {run.command for run in runs} == {"reference", "encode", "train", "finetune", "evaluate"}
    assert all(estimate(run, SCALE).bf16_flops + estimate(run, SCALE).fp32_flops > 0 for run in runs)
    assert not Path("ROOT").exists()
