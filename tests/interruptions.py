"""Fine-tunings that a signal stops, and what is compared of one that went on."""

import os
import signal
from pathlib import Path

import pytest

import eqvae.runs.finetune_run as loop
from eqvae.artifacts.files import read_journal
from eqvae.errors import Interrupted
from eqvae.runs.finetune import FinetuneConfig, finetune


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Let a signal arrive during a step."""

    def train_step(state, *arguments):
        record = real(state, *arguments)
        if state.step == step:
            os.kill(os.getpid(), number)
        return record

    real = loop.train_step
    monkeypatch.setattr(loop, "train_step", train_step)


def interrupt(config: FinetuneConfig, autoencoder, step: int) -> None:
    """Run until a SIGTERM."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        signal_after(monkeypatch, step)
        with pytest.raises(Interrupted, match=f"SIGTERM at step {step}"):
            finetune(config, autoencoder)


def train_records(folder: Path) -> list[dict]:
    """The journal's training records without their times."""
    records = [record for record in read_journal(folder) if record["kind"] == "train"]
    times = ("images_per_sec", "training_sec")
    return [{key: value for key, value in record.items() if key not in times} for record in records]
