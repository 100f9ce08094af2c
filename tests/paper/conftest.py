"""What the tests of recipes share: a third scale, at which a table takes seconds, and stages that only pretend."""

import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from eqvae.artifacts.files import write_json
from eqvae.generators.maskgit_transformer import MASKGIT_SIZES
from eqvae.generators.recipes import SIZES
from eqvae.networks.features import FeatureExtractor, Features
from eqvae.paper import execution
from eqvae.paper.equalize import EqualizeConfig
from eqvae.paper.plan import PlannedRun, describe_base
from eqvae.paper.setting import Setting
from eqvae.paper.settings import TINY
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import change_flat, flat

NUM_IMAGES = 12


class MeanColours(FeatureExtractor):
    """Twelve numbers an image, at once, in place of a network's features."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.weights_fingerprint = name, "0" * 16

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        return Features(pooled=torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1))


def measure_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all stages measure with `MeanColours`, and nobody measure the processor."""
    stand_ins = {
        "load_features": lambda name, weights=None: MeanColours(name),
        "matrix_peak_flops_per_sec": lambda device, precision: 1e12,
    }
    for name, module in list(sys.modules.items()):
        for function in stand_ins.keys() & vars(module).keys() if name.startswith("eqvae.") else ():
            monkeypatch.setattr(module, function, stand_ins[function])


def narrow_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let size `ti` be a quarter as wide: all items together then leave megabytes, not gigabytes, on the disk."""
    for sizes in (SIZES, MASKGIT_SIZES):
        monkeypatch.setitem(sizes, "ti", replace(sizes["ti"], hidden_size=sizes["ti"].hidden_size // 4))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach for the network, nor spend seconds on features or on measuring the processor, nor wait long."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(execution, "_POLL_SEC", 0.02)
    measure_at_once(monkeypatch)


def write_images(folder: Path) -> Path:
    """Write twelve noisy images of 16 px in two class folders."""
    random = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        path = folder / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_images`."""
    return write_images(tmp_path_factory.mktemp("recipes"))


def smallest(images: Path) -> Setting:
    """The tiny scale with untrained autoencoders, a few steps and a handful of images."""
    finetuning = change_flat(
        TINY.finetuning, image_size=16, batch_size=2, perceptual="none", num_validation_images=2,
        num_statistics_images=2, num_workers=0, precision="fp32",
    )  # fmt: skip
    training = {
        family: replace(
            config, max_steps=4, batch_size=2, sample_every=2, num_watch_samples=4, watch_steps=2, log_every=1,
            precision="fp32",
        )
        for family, config in TINY.training.items()
    }  # fmt: skip
    sampling = {
        family: replace(config, num_samples=6, num_steps=2, precision="fp32")
        for family, config in TINY.sampling.items()
    }
    autoencoders = {"SD-VAE": "tiny-kl-f2", "VQ-GAN": "tiny-vq-f4"}
    setting = replace(
        TINY,
        autoencoders=autoencoders, generator_base=autoencoders["SD-VAE"],
        num_images=NUM_IMAGES, num_validation_images=NUM_IMAGES, num_reference_images=NUM_IMAGES, num_classes=2,
        finetuning=finetuning,
        discrete_finetuning=change_flat(finetuning, codebook="ema", restart_dead_codes=100),
        steps_per_epoch=1, epochs=2, figure5_epochs=(1, 2),
        evaluation=replace(
            TINY.evaluation, image_size=16, num_images=8, batch_size=8, num_pictures=2, num_workers=0, lpips=False
        ),
        encoding=replace(TINY.encoding, image_size=16, num_images=None, num_workers=0, precision="fp32"),
        reference=replace(TINY.reference, image_size=16, num_workers=0),
        training=training,
        tokens_per_side=4,
        sampling=sampling,
        guided_sampling={family: replace(config, guidance_scale=2.0) for family, config in sampling.items()},
        scoring=replace(TINY.scoring, num_workers=0),
        bases={name: describe_base(name, f"untrained:{name}") for name in autoencoders.values()},
        seeds=(0, 1),
    )  # fmt: skip
    data = {"data": str(images), "reference_data": str(images), "finetune_data": None, "validation_data": None}
    return setting.with_data(**data).with_all("device", "cpu")


@pytest.fixture
def setting(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """The smallest scale, below this test's own root."""
    narrow_generators(monkeypatch)
    return replace(smallest(images), root=tmp_path / "root")


def pretend(run: PlannedRun) -> None:
    """Leave what a finished run leaves, as far as plans and tables read it; figures depend on the run's name alone."""
    config, chance = run.resolved(), zlib.crc32(run.name.encode()) / 2**32
    write_json(run.folder / "config.json", flat(config) | {"command": run.command})
    figures = {"fd_efficientnet_lite0": 100 + chance, "rfd_efficientnet_lite0": 10 + chance, "latent_std": 2.5}
    if isinstance(config, FinetuneConfig):
        figures |= {"training_device_sec": 10 + chance}
    if isinstance(config, EqualizeConfig):
        shortfall = 0.5 if "+detok" in run.name else 0.0
        figures |= {"num_steps": config.chunk_steps, "psnr_db": 20.0, "shortfall_db": shortfall}
    figures |= {"equivariance_error_rotation": chance, "intrinsic_dimension": 20 + chance, "spectrum_excess_db": chance}
    figures |= {"kd_efficientnet_lite0": 0.1 + chance}
    if isinstance(config, TrainConfig):
        figures |= {"num_steps": config.max_steps}
        records = [
            {"kind": "validation", "step": step, "training_sec": float(step), "num_samples": 4,
             "fd_efficientnet_lite0": 100 / step + chance}
            for step in range(config.sample_every or 1, config.max_steps + 1, config.sample_every or 1)
        ]  # fmt: skip
        (run.folder / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(run.folder / "metrics.json", figures)


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are only pretended; this lists those that were."""
    names: list[str] = []

    def perform(run: PlannedRun) -> None:
        names.append(run.name)
        pretend(run)

    monkeypatch.setattr(execution, "perform", perform)
    return names
