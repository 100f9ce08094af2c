"""Estimates against published figures, independent counts and files really written; what doubles a cost doubles it."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from eqvae.autoencoders import build_autoencoder, load_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.errors import UserError
from eqvae.generators.families import PUBLISHED_LATENTS, SIZES, find_recipe
from eqvae.images.image_sets import open_reference
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.metrics.statistics import compute_statistics
from eqvae.networks.features import load_features
from eqvae.paper import disk_sizes, finetuning_flops, flop_counts
from eqvae.paper.costs import (
    DEVICES,
    Cost,
    Sizes,
    encode_cost,
    evaluate_cost,
    finetune_cost,
    reference_cost,
    sample_cost,
    score_cost,
    train_cost,
)
from eqvae.runs.encode import EncodeConfig, encode
from eqvae.runs.evaluate import EvaluateConfig, evaluate
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runs.sample import SampleConfig, sample
from eqvae.runs.score import ScoreConfig
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.processes import Processes
from eqvae.runtime.run_folder import from_flat
from eqvae.training.autoencoder_state import build_state
from eqvae.training.autoencoder_step import train_step

NOWHERE = Path("nowhere")
QUICK = Sizes(autoencoder="tiny-kl", num_images=1_281_167, image_size_px=256, num_classes=1000)
"""Latents of the same shape, from an autoencoder that is counted sooner."""
IMAGENET = Sizes(autoencoder="sd-vae", num_images=1_281_167, image_size_px=256, num_classes=1000)
LABELLED = Sizes(autoencoder="tiny-kl-f2", num_images=12, image_size_px=64, num_classes=2)
"""The images that are really encoded below."""


def training(recipe: str = "dit-b-2", **changes: Any) -> TrainConfig:
    return TrainConfig(recipe=recipe, latents=NOWHERE, out=NOWHERE, **{"max_steps": 1000} | changes)


ENCODING = EncodeConfig(autoencoder="", data="", out=NOWHERE)


def evaluating(**changes: Any) -> EvaluateConfig:
    return EvaluateConfig(autoencoder="", data="", out=NOWHERE, **{"features": "inception", "lpips": False} | changes)


def tuning(**changes: Any) -> FinetuneConfig:
    return from_flat(FinetuneConfig, autoencoder="", data="photos", out=NOWHERE, **changes).resolved()


def sampling(**changes: Any) -> SampleConfig:
    return SampleConfig(run="", out=NOWHERE, **changes)


def num_bytes(*paths: Path) -> int:
    return sum(path.stat().st_size for path in paths)


# Operations: published figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["s", "b", "xl"])
def test_transformers_cost_what_was_published(size: str) -> None:
    """Table 4 of arXiv:2212.09748: 6.06, 23.01 and 118.64 Gflops for DiT-S/2, -B/2 and -XL/2, a pair counted as one."""
    config = find_recipe(f"dit-{size}-2").transformer(PUBLISHED_LATENTS)
    flops = flop_counts.backbone_flops(config)
    assert flops / 2e9 == pytest.approx(SIZES[size].gflops, rel=0.001)


def test_a_training_run_is_three_forward_passes_of_all_that_it_sees() -> None:
    flops = flop_counts.backbone_flops(find_recipe("dit-ti-2").transformer(PUBLISHED_LATENTS))
    # Samples of 50 steps for the one contact sheet come on top.
    longer, shorter = (
        train_cost(training("dit-ti-2", max_steps=steps, sample_every=steps), QUICK, "h100").flops for steps in (30, 10)
    )
    assert longer - shorter == pytest.approx(20 * 256 * 3 * flops, rel=1e-9)
    sheet = 100 * (50 * flops + flop_counts.coding_flops("tiny-kl", 256).decode)
    assert shorter - 10 * 256 * 3 * flops == pytest.approx(sheet, rel=1e-9)


def test_features_cost_what_was_published() -> None:
    """5.7 billion pairs for Inception-v3, 0.4 for EfficientNet-Lite0, 15.3 for VGG16's convolutions, by torchvision and
    TensorFlow's model zoo; 22 for DINOv2's ViT-B/14 at 224 px by arithmetic."""
    assert flop_counts.feature_flops("inception").per_image / 2e9 == pytest.approx(5.7, rel=0.02)
    assert flop_counts.feature_flops("efficientnet-lite0").per_image / 2e9 == pytest.approx(0.4, rel=0.05)
    assert flop_counts.perceptual_flops("lpips", 224) / 2e9 == pytest.approx(15.35, rel=0.01)
    teacher = flop_counts.teacher_flops("vit_base_patch14_dinov2.lvd142m", (16, 16))
    tokens, width = 257, 768
    blocks = 12 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert teacher.per_image / 2 == pytest.approx(blocks + 256 * 3 * 14**2 * width, rel=0.001)
    assert teacher.channels == width
    assert flop_counts.teacher_flops("efficientnet-lite0", (8, 8)).channels == 112
    assert flop_counts.perceptual_flops("none", 256) == 0


# Operations: independent counts -------------------------------------------------------------------------------------


def pairs_in_layers(network: nn.Module, run: Any) -> int:
    """Multiply-adds of convolutions and linear layers, from their shapes; without attention's own products."""
    counted = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        if isinstance(layer, nn.Conv2d | nn.Linear):
            counted += output.numel() * layer.weight[0].numel()

    handles = [layer.register_forward_hook(count) for layer in network.modules()]
    run()
    for handle in handles:
        handle.remove()
    return counted


def test_the_autoencoder_costs_what_its_layers_do() -> None:
    coding = flop_counts.coding_flops("sd-vae", 256)
    autoencoder = flop_counts.meta_autoencoder("sd-vae")
    x, z = torch.empty(1, 3, 256, 256, device="meta"), torch.empty(1, 4, 32, 32, device="meta")
    attention = 2 * 1024**2 * 512  # one block among the 32 x 32 cells
    encoding = pairs_in_layers(autoencoder, lambda: autoencoder.encode(x)) + attention
    decoding = pairs_in_layers(autoencoder, lambda: autoencoder.decode(z)) + attention
    assert coding.encode == pytest.approx(2 * encoding, rel=1e-9)
    assert coding.decode == pytest.approx(2 * decoding, rel=1e-9)
    assert 100e9 < encoding < 200e9 < decoding < 400e9


def test_tokens_cost_a_product_with_the_codebook() -> None:
    coding = flop_counts.coding_flops("vqgan-f16-1024", 256)
    assert coding.tokenize == 2 * 16 * 16 * 1024 * 256
    assert flop_counts.coding_flops("tiny-kl", 64).tokenize == 0


def test_a_loaded_autoencoder_stands_for_its_architecture() -> None:
    loaded = build_autoencoder("tiny-vq-f4", seed=1)
    assert flop_counts.coding_flops(loaded, 32) == flop_counts.coding_flops("untrained:tiny-vq-f4", 32)
    assert next(loaded.parameters()).device.type == "cpu"


class RealFlops(TorchDispatchMode):
    """Counts what is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **kwargs or {}, out_val=output)
        return output


def flops_of_real_steps(config: FinetuneConfig, autoencoder: Autoencoder, num_steps: int) -> list[int]:
    training = config.training
    state = build_state(autoencoder, training, torch.device("cpu"))
    loss = ReconstructionLoss(training.reconstruction.perceptual, training.reconstruction.perceptual_weight)
    x = torch.rand(training.batch_size, 3, config.image_size, config.image_size) * 2 - 1
    counted = []
    for _ in range(num_steps):
        with RealFlops() as counter:
            train_step(state, x, training, loss, training.transform.sampler())
        counted.append(counter.total)
    return counted


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny-kl-f2", {"discriminator_warmup_steps": 1}),
        ("tiny-vq-f4", {"discriminator_warmup_steps": 1, "codebook": "ema"}),
        ("tiny-kl-f2", {"adversarial_weight": 0.0, "freeze_encoder": True}),
        ("tiny-kl-f2", {"adversarial_weight": 0.0, "perceptual": "none"}),
    ],
)
def test_a_plain_step_costs_what_it_really_computes(preset: str, changes: dict[str, Any]) -> None:
    config = tuning(transforms="plain", image_size=32, batch_size=2, max_steps=2, precision="fp32", **changes)
    counted = flops_of_real_steps(config, build_autoencoder(preset, seed=0), 2)
    estimated = finetuning_flops.finetuning_flops(config, preset)
    assert config.training.batch_size * estimated.training == pytest.approx(counted[1], rel=0.002)
    if config.discriminator_warmup_steps:
        assert config.training.batch_size * estimated.warming_up == pytest.approx(counted[0], rel=0.002)


@pytest.mark.parametrize("objective", ["explicit", "explicit-stop-gradient"])
def test_the_explicit_objective_encodes_again(objective: Any) -> None:
    config = tuning(
        objective=objective, transforms="rotation", equivariance_probability=1.0, image_size=32, batch_size=2,
        max_steps=1, precision="fp32", adversarial_weight=0.0, perceptual="none",
    )  # fmt: skip
    (counted,) = flops_of_real_steps(config, build_autoencoder("tiny-kl-f2", seed=0), 1)
    estimated = finetuning_flops.finetuning_flops(config, "tiny-kl-f2")
    assert config.training.batch_size * estimated.training == pytest.approx(counted, rel=0.002)


def test_scaled_pictures_count_by_their_area() -> None:
    """The mean of s^2 for s uniform in [0.25, 1) is 7/16; cells are snapped down, by half of one in the mean."""

    def flops(probability: float) -> float:
        config = tuning(image_size=64, equivariance_probability=probability, adversarial_weight=0.0)
        return finetuning_flops.finetuning_flops(config, "tiny-kl-f2").training

    # Three times the encoder, but for the gradient with respect to the image.
    encoder = finetuning_flops._encoder_flops("tiny-kl-f2", 64, False)
    area = (flops(1.0) - encoder) / (flops(0.0) - encoder)
    assert area == pytest.approx(7 / 16 - 0.5 * (1 + 0.25) / 32, rel=0.04)
    assert flops(0.5) == pytest.approx((flops(0.0) + flops(1.0)) / 2)


# Operations: what doubles them --------------------------------------------------------------------------------------


def test_guidance_doubles_the_transformers_part() -> None:
    def flops(recipe: str = "sit-ti-2", sizes: Sizes = QUICK, **changes: Any) -> float:
        return sample_cost(sampling(num_samples=10, **changes), recipe, sizes, "h100").flops

    decoding = 10 * flop_counts.coding_flops("tiny-kl", 256).decode
    plain = flops() - decoding
    assert flops(guidance_scale=1.5) - decoding == pytest.approx(2 * plain)
    assert flops(guidance_scale=1.8, guidance_high=0.7) - decoding == pytest.approx(1.7 * plain)
    assert flops(num_steps=50) - decoding == pytest.approx(plain / 5)
    assert flops(sampler="heun") - decoding == pytest.approx(plain * 499 / 250)
    tokens = replace(QUICK, autoencoder="tiny-vq")
    decoding = 10 * flop_counts.coding_flops("tiny-vq", 256).decode
    plain = flops("maskgit-ti", tokens) - decoding  # of 8 steps, whose first a linear schedule leaves unguided
    assert flops("maskgit-ti", tokens, guidance_scale=3.0) - decoding == pytest.approx(15 / 8 * plain)
    constant = flops("maskgit-ti", tokens, guidance_scale=3.0, guidance_schedule="constant") - decoding
    assert constant == pytest.approx(2 * plain)
    assert flops("maskgit-ti", tokens, guidance_scale=3.0, sampler="halton") - decoding == pytest.approx(8 * plain)


def test_mirror_images_double_a_cache() -> None:
    both, one = encode_cost(ENCODING, IMAGENET, "h100"), encode_cost(replace(ENCODING, mirror=False), IMAGENET, "h100")
    assert both.flops == pytest.approx(2 * one.flops)
    assert both.disk_bytes == pytest.approx(2 * one.disk_bytes, rel=0.01)
    # 1,281,167 images and mirror images of two moments of 4 x 32 x 32 in two bytes.
    assert both.disk_bytes == pytest.approx(1_281_167 * 2 * 2 * 4096 * 2, rel=0.002)


def test_what_a_training_run_does_besides() -> None:
    def flops(config: TrainConfig, sizes: Sizes = QUICK) -> float:
        return train_cost(config, sizes, "h100").flops

    plain = flops(training("sit-ti-2"))
    watched = flops(training("sit-ti-2", reference="saved.safetensors", features="inception", num_watch_samples=100))
    drawn = sample_cost(sampling(num_samples=1000, num_steps=50), "sit-ti-2", QUICK, "h100").flops
    assert watched - plain == pytest.approx(drawn + 1000 * flop_counts.feature_flops("inception").per_image)
    seen = replace(QUICK, num_reference_images=500)
    read = flops(training("sit-ti-2", reference="folder", features="inception", num_watch_samples=100), seen)
    assert read - watched == pytest.approx(500 * flop_counts.feature_flops("inception").per_image)
    repa = flops(training("repa-sit-ti-2"))
    teacher = flop_counts.teacher_flops("vit_base_patch14_dinov2.lvd142m", (16, 16)).per_image
    projector = 3 * 2 * 256 * (192 * 2048 + 2048**2 + 2048 * 768)  # forward and backward of three layers, 256 tokens
    # Output channels and sampler apart: SiT's learns none, and its published network still puts out twice as many.
    assert repa - plain == pytest.approx(256_000 * (teacher + projector), rel=0.01)
    again = flops(training("sit-ti-2", gradient_checkpointing=True, sample_every=1000)) / flops(
        training("sit-ti-2", sample_every=1000)
    )
    assert again == pytest.approx(4 / 3, rel=0.01)


def test_an_evaluation_with_everything_costs_more() -> None:
    config = evaluating(num_images=1000)
    coding, features = flop_counts.coding_flops("sd-vae", 256), flop_counts.feature_flops("inception").per_image
    # Three rotations, and scales of 1/4, 1/2 and 3/4.
    transformed = 3 + 1 / 16 + 1 / 4 + 9 / 16
    plain = coding.encode * (1 + transformed) + coding.decode + 2 * features
    assert evaluate_cost(config, IMAGENET, "h100").flops == pytest.approx(1000 * plain)
    everything = plain + coding.decode * (transformed + 1) + 13 * features
    assert evaluate_cost(replace(config, all=True), IMAGENET, "h100").flops == pytest.approx(1000 * everything)
    lpips = plain + 2 * flop_counts.perceptual_flops("lpips", 256)
    assert evaluate_cost(replace(config, lpips=True), IMAGENET, "h100").flops == pytest.approx(1000 * lpips)


def test_a_score_reads_both_sets() -> None:
    config = ScoreConfig(samples=NOWHERE, reference="", out=NOWHERE, num_images=100)
    saved, images = IMAGENET, replace(IMAGENET, num_reference_images=300)
    features = flop_counts.feature_flops("inception").per_image
    one, two = score_cost(config, saved, "h100"), score_cost(config, images, "h100")
    distances = 2 * 2048 * 100**2
    assert one.flops == pytest.approx(100 * features + 3 * distances)
    assert two.flops == pytest.approx(400 * features + (1 + 9 + 3) * distances)
    assert score_cost(replace(config, num_images=None), saved, "h100").flops > 400 * one.flops
    assert one.disk_bytes == 0


# Hours --------------------------------------------------------------------------------------------------------------


def test_hours_are_operations_over_what_a_device_reaches() -> None:
    assert {"a100-80gb", "h100", "h200", "rtx-4090", "cpu"} <= DEVICES.keys()
    for name, device in DEVICES.items():
        assert 0 < device.reached_share < 1 and device.fp32_flops_per_sec < device.bf16_flops_per_sec
        cost = encode_cost(ENCODING, IMAGENET, name)
        expected = cost.flops / (device.bf16_flops_per_sec * device.reached_share * 3600)
        assert cost.device_hours == pytest.approx(expected)
        slow = encode_cost(replace(ENCODING, precision="fp32"), IMAGENET, name)
        ratio = device.bf16_flops_per_sec / device.fp32_flops_per_sec
        assert slow.device_hours == pytest.approx(ratio * cost.device_hours)
    with pytest.raises(UserError, match="Did you mean 'h100'"):
        reference_cost("efficientnet-lite0", 10, "h10")


def test_costs_add_up() -> None:
    a, b = Cost(flops=1.0, device_hours=2.0, disk_bytes=3), Cost(flops=10.0, device_hours=20.0, disk_bytes=30)
    assert a + b == Cost(flops=11.0, device_hours=22.0, disk_bytes=33)


def test_generators_of_the_other_kind_are_refused() -> None:
    with pytest.raises(UserError, match="maskgit-ti"):
        train_cost(training("maskgit-ti"), QUICK, "h100")
    with pytest.raises(UserError, match="dit-ti-2"):
        sample_cost(sampling(), "dit-ti-2", replace(QUICK, autoencoder="tiny-vq"), "h100")


def test_neither_weights_nor_network_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With networks whose weights are not here."""

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("weights or network")

    for owner, name in ((socket, "socket"), (torch, "load"), (nn.Module, "load_state_dict")):
        monkeypatch.setattr(owner, name, forbidden)
    monkeypatch.setattr("safetensors.safe_open", forbidden)
    flop_counts.meta_autoencoder.cache_clear()
    flop_counts.feature_flops.cache_clear()
    flop_counts.teacher_flops.cache_clear()
    paper = (tuning(perceptual="lpips"), evaluating(lpips=True, all=True), training("repa-sit-ti-2"))
    finetune_cost(paper[0], QUICK, "h100")
    evaluate_cost(paper[1], QUICK, "h100")
    encode_cost(ENCODING, QUICK, "h100")
    train_cost(paper[2], QUICK, "h100")
    sample_cost(sampling(), "repa-sit-ti-2", QUICK, "h100")
    score_cost(ScoreConfig(samples=NOWHERE, reference="", out=NOWHERE), QUICK, "h100")


@pytest.mark.slow
def test_the_papers_scale_takes_days() -> None:
    """EQ-VAE's five epochs at batch 160 and a DiT-XL/2 of 400,000 steps."""
    tuned = finetune_cost(tuning(perceptual="lpips", max_steps=50_000, batch_size=160), IMAGENET, "a100-80gb")
    trained = train_cost(training("dit-xl-2", max_steps=400_000), IMAGENET, "a100-80gb")
    # Three passes over 24 million images of 2 x 118.64e9 operations, and some samples.
    assert trained.flops == pytest.approx(400_000 * 256 * 3 * 237.3e9, rel=0.01)
    assert 24 < tuned.device_hours < 24 * 7
    assert 24 * 3 < trained.device_hours < 24 * 14


# Disk: files really written -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 64 px."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(12):
        path = folder / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


def cache_of(images: Path, out: Path, preset: str, **changes: Any) -> EncodeConfig:
    settings = {"image_size": 64, "shard_size": 8, "num_workers": 0, "device": "cpu"} | changes
    config = EncodeConfig(autoencoder=f"untrained:{preset}", data=str(images), out=out, **settings)
    encode(config, load_autoencoder(config.autoencoder))
    return config


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny-kl-f2", {}),
        ("tiny-kl-f2", {"mirror": False, "dtype": "float32", "label_column": "none"}),
        ("tiny-vq-f4", {"num_images": 10}),
    ],
)
def test_a_cache_is_as_large_as_estimated(preset: str, changes: dict[str, Any], images: Path, tmp_path: Path) -> None:
    config = cache_of(images, tmp_path / "cache", preset, **changes)
    num_classes = 0 if "label_column" in changes else 2
    sizes = replace(LABELLED, autoencoder=preset, num_classes=num_classes)
    written = num_bytes(*(tmp_path / "cache").glob("shard-*.safetensors"))
    assert encode_cost(config, sizes, "cpu").disk_bytes == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize(("preset", "recipe"), [("tiny-kl-f2", "dit-ti-8"), ("tiny-vq-f4", "maskgit-ti")])
def test_a_generator_and_its_samples_are_as_large_as_estimated(
    preset: str, recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eqvae.runs.train_run.matrix_peak_flops_per_sec", lambda device, precision: 1e12)
    cache_of(images, tmp_path / "cache", preset)
    sizes = replace(LABELLED, autoencoder=preset)
    config = TrainConfig(
        recipe=recipe, latents=tmp_path / "cache", out=tmp_path / "run", max_steps=1, batch_size=2, device="cpu",
        num_watch_samples=2, watch_steps=2, posthoc_ema=True,
    )  # fmt: skip
    train(config)
    written = num_bytes(*(tmp_path / "run").rglob("*.safetensors"))
    assert train_cost(config, sizes, "cpu").disk_bytes == pytest.approx(written, rel=0.001)
    plain = train_cost(replace(config, posthoc_ema=False), sizes, "cpu").disk_bytes
    num_parameters = sum(value.numel() for value in load_weights(tmp_path / "run").values())
    assert plain == pytest.approx(6 * 4 * num_parameters, rel=0.02)
    drawing = sampling(num_samples=20, num_steps=2, device="cpu")
    drawing = replace(drawing, run=str(tmp_path / "run"), out=tmp_path / "samples")
    sample(drawing)
    written = num_bytes(tmp_path / "samples" / "samples.npz")
    assert sample_cost(drawing, recipe, sizes, "cpu").disk_bytes == pytest.approx(written, rel=0.001)


def load_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "generator" / "ema.safetensors")


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny-kl-f2", {}),
        ("tiny-kl-f2", {"adversarial_weight": 0.0, "ema_decay": 0.0, "freeze_encoder": True}),
        ("tiny-vq-f4", {"codebook": "ema", "restart_dead_codes": 5}),
    ],
)
def test_a_fine_tuning_run_is_as_large_as_estimated(
    preset: str, changes: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    config = from_flat(
        FinetuneConfig,
        autoencoder=f"untrained:{preset}", data=str(images), out=tmp_path / "run", max_steps=1, image_size=32,
        batch_size=2, transforms="plain", perceptual="none", validation_data=str(images), num_validation_images=2,
        num_statistics_images=2, num_workers=0, device="cpu", **changes,
    )  # fmt: skip
    finetune(config, load_autoencoder(config.autoencoder))
    written = num_bytes(*(tmp_path / "run").rglob("*.safetensors"))
    estimated = finetune_cost(config, replace(LABELLED, autoencoder=preset), "cpu").disk_bytes
    assert estimated == pytest.approx(written, rel=0.005)


def test_an_evaluation_is_as_large_as_estimated(images: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        autoencoder="untrained:tiny-kl-f2", data=str(images), out=tmp_path / "evaluation", image_size=64,
        num_workers=0, num_pictures=4, features="efficientnet-lite0", device="cpu",
    )  # fmt: skip
    evaluate(config, load_autoencoder(config.autoencoder))
    written = num_bytes(tmp_path / "evaluation" / "pictures.safetensors")
    assert evaluate_cost(config, LABELLED, "cpu").disk_bytes == pytest.approx(written, rel=0.02)


def test_saved_statistics_are_as_large_as_estimated(images: Path, tmp_path: Path) -> None:
    statistics = compute_statistics(
        load_features("efficientnet-lite0"), open_reference(str(images), image_size_px=32), indices=range(12),
        device=torch.device("cpu"), processes=Processes(rank=0, count=1, device=torch.device("cpu")),
    )  # fmt: skip
    statistics.save(tmp_path / "statistics.safetensors")
    written = num_bytes(tmp_path / "statistics.safetensors")
    assert disk_sizes.statistics_bytes("efficientnet-lite0", 12) == pytest.approx(written, rel=0.001)
    assert reference_cost("efficientnet-lite0", 12, "cpu").disk_bytes == pytest.approx(written, rel=0.001)
