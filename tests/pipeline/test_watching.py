"""The distance that is measured during training does not depend on how many processes measure it."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eqvae.autoencoders import load_autoencoder
from eqvae.generators.checkpoints import read_generator
from eqvae.latents.cache import LatentCache
from eqvae.networks.features import load_features
from eqvae.runs.train import train
from eqvae.runs.train_config import TrainConfig
from eqvae.runs.train_watch import SampleWatch, load_reference
from eqvae.runtime.processes import Processes

CPU = torch.device("cpu")
ALONE = Processes(rank=0, count=1, device=CPU)


@dataclass(frozen=True, kw_only=True)
class Threads(Processes):
    """Processes played by threads: what they exchange goes through a list."""

    barrier: threading.Barrier
    table: list[Any] = field(default_factory=list)

    def wait(self) -> None:
        self.barrier.wait(60)

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.wait()
        values = list(self.table)
        self.wait()
        return values

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.gather(value)).sum(0)


@pytest.fixture
def config(configure, data: Path) -> TrainConfig:
    """Of a run that has just exported its generator."""
    config = configure(reference=str(data), max_steps=1, num_watch_samples=4)
    train(replace(config, reference=None))
    return config


@pytest.fixture
def watch(config: TrainConfig) -> SampleWatch:
    """Watches that run, alone."""
    return SampleWatch(
        config=config, generator=lambda: read_generator(config.out),
        reference=load_reference(config, LatentCache.open(config.latents).index, ALONE),
        autoencoder=load_autoencoder("untrained:tiny-kl").eval(), processes=ALONE,
    )  # fmt: skip


@pytest.mark.parametrize("count", [2, 5])
def test_the_number_of_processes_does_not_show(watch, count: int):
    alone = watch(1)
    assert alone.keys() == {"fd_efficientnet_lite0", "kd_efficientnet_lite0", "num_samples"}
    barrier, table, found = threading.Barrier(count), [None] * count, [{}] * count

    def play(rank: int) -> None:
        processes = Threads(rank=rank, count=count, device=CPU, barrier=barrier, table=table)
        found[rank] = replace(watch, processes=processes)(1)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for figures in found:
        assert figures["fd_efficientnet_lite0"] == pytest.approx(alone["fd_efficientnet_lite0"], rel=1e-3)
        assert figures["kd_efficientnet_lite0"] == pytest.approx(alone["kd_efficientnet_lite0"], rel=1e-2, abs=1e-4)
        assert figures["num_samples"] == 4


def test_without_reference_there_are_pictures_only(watch):
    config = replace(watch.config, num_watch_samples=20)
    assert replace(watch, config=config, reference=None)(1) == {}
    with Image.open(config.out / "samples" / "step_0000001.png") as sheet:
        width, height = sheet.size
    assert height == 2 * 66 + 2  # a row for each of the two classes
    assert 10 * 66 + 2 < width < 11 * 66  # whose names stand at the left


def test_an_adm_batch_is_taken_as_score_takes_it(configure, latents, untrained_inception, tmp_path, monkeypatch):
    """Its moments count, with images beside them or alone."""
    inception = load_features("inception", weights=untrained_inception)
    monkeypatch.setattr("eqvae.runs.train_watch.load_features", lambda name: inception)
    random, index = np.random.default_rng(0), LatentCache.open(latents).index
    moments = {"mu": random.normal(size=2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "alone.npz", **moments)
    np.savez(tmp_path / "both.npz", arr_0=random.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8), **moments)
    config = configure(features="inception", reference=str(tmp_path / "alone.npz"))
    alone = load_reference(config, index, ALONE)
    both = load_reference(replace(config, reference=str(tmp_path / "both.npz")), index, ALONE)
    for found in (alone, both):
        assert found.statistics.mean.tolist() == moments["mu"].tolist()
        assert found.identity["reference_moments"] == "file"
    assert (alone.takes_moments_of_a_batch, both.takes_moments_of_a_batch) == (False, True)
    assert (alone.statistics.pooled, len(both.statistics.pooled)) == (None, 3)
