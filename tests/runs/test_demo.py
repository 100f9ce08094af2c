"""The demo, called again for more steps, measures the model that came of them."""

from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_json
from eqvae.autoencoders import load_autoencoder
from eqvae.runs import demo as module
from eqvae.runs.demo import DemoConfig, demo
from eqvae.runs.finetune import FinetuneConfig


@pytest.mark.slow
def test_a_model_that_went_on_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def scale_weights(config: FinetuneConfig) -> None:
        """Stand for the fine-tuning: other weights for another number of steps."""
        model = load_autoencoder("tiny-kl")
        with torch.no_grad():
            next(model.parameters()).mul_(1 + config.training.polish_steps / 100)
        model.save(config.out / "autoencoder")

    monkeypatch.setattr(module, "finetune", scale_weights)
    monkeypatch.setattr(module, "write_report", lambda folders, out: None)
    monkeypatch.setattr(module, "MEASURED_AT_PX", 32)
    monkeypatch.setattr(module, "NUM_ANGLES", 0)

    def measured(polish_steps: int) -> str:
        demo(DemoConfig(out=tmp_path, max_steps=1, polish_steps=polish_steps))
        return read_json(tmp_path / "after" / "config.json")["fingerprint"]

    short = measured(polish_steps=1)
    assert measured(polish_steps=20) != short
