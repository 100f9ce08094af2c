"""REPA's teacher: tokens of the very images, on the fly or from a file."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from eqvae.artifacts import read_journal
from eqvae.errors import UserError
from eqvae.generators.export import read_generator
from eqvae.generators.presets import parse_recipe
from eqvae.latents import LatentCache
from eqvae.latents.teaching import TeacherTokens, teach
from eqvae.runs.train import train_generator
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.processes import Processes

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
REPA = {"recipe": "repa-sit-ti-4", "teacher": "efficientnet-lite0"}


def tokens_of(config: TrainConfig) -> TeacherTokens:
    return teach(config, LatentCache.open(config.latents), parse_recipe(config.recipe), ALONE)


def test_tokens_are_the_images(configure, latents: Path):
    taught = tokens_of(configure(**REPA))
    indices, mirrored = torch.tensor([9, 0, 9]), torch.tensor([False, True, True])
    found = taught.tokens(indices, mirrored)
    assert found.shape == (3, 4, taught.channels)  # 8 x 8 cells in patches of 4
    images = taught.images(indices)
    assert images[0].float().mean((1, 2)).argmax() == 2  # image 9 is of class b: blue
    assert images[1].float().mean((1, 2)).argmax() == 0
    alone = taught.teacher(images[1:2].flip(-1))
    assert F.cosine_similarity(found[1:2], alone, dim=-1).min() > 0.99  # bf16
    assert not torch.allclose(found[0], found[2])


def test_cached_tokens_are_those_of_the_fly(configure, latents: Path):
    on_the_fly, cached = tokens_of(configure(**REPA)), tokens_of(configure(**REPA, cache_teacher=True))
    indices, mirrored = torch.tensor([1, 2, 11]), torch.tensor([True, False, True])
    one, other = on_the_fly.tokens(indices, mirrored), cached.tokens(indices, mirrored)
    assert cached.teacher is None
    assert F.cosine_similarity(one, other, dim=-1).min() > 0.99
    (path,) = latents.glob("teacher-efficientnet-lite0-2x2.safetensors")
    written = path.stat().st_mtime_ns
    tokens_of(configure(**REPA, cache_teacher=True))
    assert path.stat().st_mtime_ns == written
    # Another patch size has another grid, and so tokens of its own.
    assert (
        tokens_of(configure(**REPA | {"recipe": "repa-sit-ti-2"}, cache_teacher=True))
        .tokens(indices, mirrored)
        .shape[1]
        == 16
    )


@pytest.mark.parametrize("cached", [False, True])
def test_repa_trains(configure, cached: bool):
    config = configure(**REPA, cache_teacher=cached, max_steps=6, gradient_accumulation_steps=2)
    train_generator(config)
    records = [record for record in read_journal(config.out) if record["kind"] == "train"]
    for record in records:
        assert record["loss"] == pytest.approx(record["mse"] + 0.5 * record["repa"], rel=1e-4)
    assert records[-1]["repa"] < records[0]["repa"]  # towards -1
    generator = read_generator(config.out)
    assert generator.card.interpolant.time_of_data == 0
    assert generator.transformer.state_dict()["projectors.0.4.bias"].shape == (112,)


def test_other_images_are_refused(configure, other_data: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds other images than those.*Name the encoded images with --data"):
        train_generator(configure(**REPA, data=str(other_data)))
    with pytest.raises(UserError, match="no/such"):
        train_generator(configure(**REPA, data="no/such/folder"))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_be_had(configure):
    with pytest.raises(UserError, match="--teacher efficientnet-lite0, which works offline"):
        train_generator(configure(**REPA | {"teacher": "vit_tiny_patch16_224"}))
