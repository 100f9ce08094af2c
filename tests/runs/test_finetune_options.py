"""Options of the loop that lean on other packages: TensorBoard, torch.compile, --dry-run's arithmetic."""

import subprocess
import sys
from pathlib import Path

import pytest

from eqvae.artifacts.files import read_journal
from eqvae.autoencoders import build_autoencoder
from eqvae.errors import UserError
from eqvae.runs.finetune import FinetuneConfig, finetune, plan
from eqvae.runtime.run_folder import from_flat


def configure(folder: Path, data: Path, **changes) -> FinetuneConfig:
    quick = {
        "image_size": 64, "batch_size": 2, "max_steps": 2, "log_every": 1, "num_workers": 0, "perceptual": "none",
        "adversarial_weight": 0.0, "num_validation_images": 2, "num_statistics_images": 2, "device": "cpu",
        "validation_data": str(data),
    }  # fmt: skip
    return from_flat(FinetuneConfig, autoencoder="small", data=str(data), out=folder / "run", **(quick | changes))


def test_tensorboard_gets_the_journal(tmp_path, photographs, small_autoencoder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configure(tmp_path, photographs, tensorboard=True)
    finetune(config, small_autoencoder)
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/l1")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-kl", "tiny-vq"])
def test_compiled_training_gives_the_same_losses(tmp_path, photographs, name):
    """In a process of its own: the compiler does not see through the type checks that the test suite puts in."""
    flags = ("--no-compile", "--compile")
    arguments = [
        "finetune", f"untrained:{name}", "--data", str(photographs), "--validation-data", str(photographs),
        "--max-steps", "2", "--image-size", "64", "--batch-size", "2", "--log-every", "1", "--perceptual", "none",
        "--adversarial-weight", "0", "--precision", "fp32", "--transforms", "rotation",
        "--num-validation-images", "2", "--num-statistics-images", "2", "--num-workers", "0",
    ]  # fmt: skip
    runs = [[*arguments, flag, "--out", str(tmp_path / flag)] for flag in flags]
    code = f"from eqvae.cli import run; raise SystemExit(sum(run(arguments) for arguments in {runs}))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    journals = [read_journal(tmp_path / flag) for flag in flags]
    losses = [[record["l1"] for record in journal if record["kind"] == "train"] for journal in journals]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_plan_counts_convolutions(tmp_path):
    autoencoder = build_autoencoder("tiny-kl", seed=0)
    config = configure(tmp_path, tmp_path)
    figures = plan(config, autoencoder)
    assert figures["num_parameters"] == autoencoder.num_parameters()
    assert figures["latent_size"] == [4, 8, 8]
    assert figures["tflops_total"] == pytest.approx(2 * figures["tflops_per_step"])
    larger = plan(configure(tmp_path, tmp_path, image_size=128), autoencoder)
    assert larger["tflops_per_step"] == pytest.approx(4 * figures["tflops_per_step"], rel=1e-6)
    assert larger["memory_gib"] > figures["memory_gib"]
    assert not config.out.exists()


def test_a_frozen_encoder_keeps_its_weights_and_the_decoder_learns(tmp_path, photographs, small_autoencoder):
    before = {name: value.clone() for name, value in small_autoencoder.state_dict().items()}
    figures = finetune(configure(tmp_path, photographs, freeze_encoder=True), small_autoencoder)
    after = small_autoencoder.state_dict()
    moved = {name.split(".")[0] for name, value in after.items() if not value.equal(before[name])}
    assert moved == {"decoder", "layer"}
    assert figures["equivariance_error_scale"] == figures["before_equivariance_error_scale"]


def test_a_frozen_encoder_has_no_explicit_objective(tmp_path, photographs):
    with pytest.raises(UserError, match="--freeze-encoder leaves"):
        configure(tmp_path, photographs, freeze_encoder=True, objective="explicit").resolved()
