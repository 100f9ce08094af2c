"""A run in progress: resuming bit by bit, journal, checkpoints, watching, divergence."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqvae.artifacts.files import read_journal, read_json, read_tensors
from eqvae.artifacts.names import CHECKPOINT, SNAPSHOTS
from eqvae.errors import Interrupted, UserError
from eqvae.generators.checkpoints import GeneratorCard, read_generator
from eqvae.generators.families import find_recipe
from eqvae.generators.interpolant import Interpolant, InterpolantObjective
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.recipes import SIZES
from eqvae.runs.train import Run
from eqvae.runs.train_config import TrainConfig
from eqvae.runs.train_cost import transformer_flops
from eqvae.runtime.processes import Processes
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import StopRequest
from eqvae.training.generator_step import TrainingBatch, build_state

CPU = torch.device("cpu")
OBJECTIVE = InterpolantObjective(num_classes=5, doubled_output=True)


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass
class Session:
    """Trains in one folder; each call is a new process's part."""

    build_transformer: object
    config: TrainConfig
    stop_at: int | None = None
    """Step whose batch brings a SIGTERM."""
    die_at: int | None = None
    """Step whose batch kills the process."""
    spoil_at: int | None = None
    """Step whose batch is NaN."""
    die_in_watch: int | None = None

    def batches(self, stop: StopRequest, first_step: int, num_steps: int) -> Generator[TrainingBatch, None, None]:
        for step in range(first_step, first_step + num_steps):
            if step == self.die_at:
                raise KilledError
            if step == self.stop_at:
                stop.signal_name = "SIGTERM"
            generator = generator_for(5, step)
            latents = torch.randn(4, 3, 4, 6, generator=generator)
            labels = torch.randint(5, (4,), generator=generator)
            yield TrainingBatch(latents=latents * (float("nan") if step == self.spoil_at else 1.0), labels=labels)

    def watch(self, step: int) -> dict[str, float | int]:
        if step == self.die_in_watch:
            raise KilledError
        exported = read_generator(self.config.out)
        assert exported.card.num_steps == step
        return {"fd_none": float(exported.transformer.x_embedder.proj.weight.detach().sum()), "num_samples": 3}

    def __call__(self) -> dict:
        stop, config = StopRequest(), self.config.resolved()
        transformer = self.build_transformer()
        card = GeneratorCard(
            family="sit", recipe="sit-ti-2", transformer=transformer.config, interpolant=Interpolant(),
            shift=(0.0,) * 3,
            scale=(1.0,) * 3, autoencoder="none", autoencoder_fingerprint="none", image_size_px=32, class_names=None,
            num_steps=0, eqvae_version="0",
        )  # fmt: skip
        config.out.mkdir(exist_ok=True)
        run = Run(
            config=config, processes=Processes(rank=0, count=1, device=CPU), objective=OBJECTIVE, card=card,
            state=build_state(transformer, OBJECTIVE, config, CPU), watch=self.watch, stop=stop,
            batches=lambda first_step, num_steps: self.batches(stop, first_step, num_steps),
        )  # fmt: skip
        return run.train()


@pytest.fixture
def session(build_transformer, tmp_path: Path, monkeypatch):
    """Makes sessions that train 6 steps into a folder of the given name."""
    monkeypatch.setattr("eqvae.runs.train.matrix_peak_flops_per_sec", lambda device, precision: 1e12)

    def make(name: str, **options) -> Session:
        faults = {key: options.pop(key) for key in list(options) if key in Session.__dataclass_fields__}
        settings = {
            "max_steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "sample_every": 3,
            "precision": "fp32", "device": "cpu", "posthoc_ema": True,
        }  # fmt: skip
        config = TrainConfig(recipe="sit-ti-2", latents=tmp_path, out=tmp_path / name, **settings | options)
        return Session(build_transformer, config, **faults)

    return make


def checkpoint(out: Path) -> dict[str, Tensor]:
    return read_tensors(out / CHECKPOINT)[0]


def assert_same(one: Session, other: Session) -> None:
    """Every tensor of both checkpoints, and every figure of both journals that no clock gives."""
    a, b = checkpoint(one.config.out), checkpoint(other.config.out)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert journal(one.config.out) == journal(other.config.out)


def journal(out: Path) -> list[dict]:
    clocks = ("images_per_sec", "share_of_peak", "training_sec")
    return [{key: record[key] for key in record if key not in clocks} for record in read_journal(out)]


@pytest.mark.parametrize(("log_every", "checkpoint_every", "sample_every"), [(1, 2, 3), (4, 3, 5), (10, 1, 1)])
@pytest.mark.parametrize(("fault", "when"), [("stop_at", 2), ("stop_at", 4), ("die_at", 3), ("die_at", 5)])
def test_interrupted_and_resumed(session, log_every, checkpoint_every, sample_every, fault, when):
    every = {"log_every": log_every, "checkpoint_every": checkpoint_every, "sample_every": sample_every}
    straight = session("straight", **every)
    figures = straight()
    broken = session("broken", **every, **{fault: when})
    with pytest.raises((Interrupted, KilledError)):
        broken()
    resumed = session("broken", **every)
    again = resumed()
    assert_same(straight, resumed)
    assert {name for name in figures if figures[name] != again[name]} <= {"training_sec", "training_images_per_sec"}


@pytest.mark.parametrize("when", [3, 6])
def test_killed_while_watching(session, when: int):
    straight = session("straight")
    straight()
    with pytest.raises(KilledError):
        session("broken", die_in_watch=when)()
    resumed = session("broken")
    resumed()
    assert_same(straight, resumed)
    assert read_generator(resumed.config.out).card.num_steps == 6


def test_stopped_at_the_last_step(session):
    with pytest.raises(Interrupted, match="SIGTERM at step 6; the same command goes on"):
        session("run", stop_at=5)()
    figures = session("run")()
    assert figures["fd_none"] == read_journal(session("run").config.out)[-1]["fd_none"]
    assert read_generator(session("run").config.out).card.num_steps == 6


def test_a_signal_does_not_wait_for_the_journal(session):
    with pytest.raises(Interrupted, match="at step 3"):
        session("run", log_every=1000, stop_at=2)()
    assert "journal.jsonl" not in [path.name for path in session("run").config.out.iterdir()]


def test_journal_and_figures(session):
    run = session("run", log_every=4, sample_every=4)
    figures = run()
    records = read_journal(run.config.out)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 4), ("validation", 4), ("train", 6), ("validation", 6),
    ]  # fmt: skip
    assert {"loss", "mse", "gradient_norm", "images_per_sec", "share_of_peak", "training_sec"} <= records[0].keys()
    assert {"fd_none", "num_samples", "training_sec"} <= records[1].keys()
    assert records[1]["training_sec"] == records[0]["training_sec"] < records[3]["training_sec"]
    assert (figures["num_steps"], figures["num_images"], figures["fd_none"]) == (6, 24, records[3]["fd_none"])
    assert read_json(run.config.out / "metrics.json") == figures
    assert len(list((run.config.out / SNAPSHOTS).iterdir())) == 4  # two horizons at two steps


def test_divergence_keeps_the_last_good_state(session):
    run = session("run", spoil_at=3)
    with pytest.raises(UserError, match=r"diverged at step 3 \(.*loss nan.*it began with the mse.*--learning-rate"):
        run()
    record = read_json(run.config.out / "diverged.json")
    assert (record["step"], record["began"], record["terms"]["loss"]) == (3, "mse", "nan")
    assert record["processes"][0]["generator_key"] == [0, 3, 1]
    straight = session("straight", max_steps=3)
    straight()
    good, expected = checkpoint(run.config.out), checkpoint(straight.config.out)
    assert all(torch.equal(good[name], expected[name]) for name in expected)


def test_gradient_checkpointing_and_accumulation_change_nothing_much(session):
    plain, saving = session("plain"), session("saving", gradient_checkpointing=True, gradient_accumulation_steps=4)
    plain()
    saving()
    for one, other in zip(journal(plain.config.out), journal(saving.config.out), strict=True):
        if one["kind"] == "train":
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)


def test_the_seed_draws_times_and_noise(session):
    one, other = session("one"), session("other", seed=1)
    one()
    other()
    assert journal(one.config.out)[0]["loss"] != journal(other.config.out)[0]["loss"]


@pytest.mark.parametrize("name", ["dit-s-2", "dit-b-2"])
def test_counted_operations_are_the_published_ones(name: str):
    recipe = find_recipe(name)
    config = recipe.transformer(LatentSpecification(channels=4, height=32, width=32, num_classes=1000))
    assert transformer_flops(config) / 2e9 == pytest.approx(SIZES[recipe.size].gflops, rel=0.01)


def test_changed_precision_of_the_config_is_used(session):
    run = session("run", max_steps=1)
    other = session("other", max_steps=1)
    other.config = replace(other.config, precision="bf16")
    run()
    other()
    one, two = journal(run.config.out)[0]["loss"], journal(other.config.out)[0]["loss"]
    assert one != two
    assert one == pytest.approx(two, rel=0.05)
