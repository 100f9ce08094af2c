"""Options of the loop that lean on other packages: TensorBoard, torch.compile, --dry-run's arithmetic."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import UInt8
from torch import Tensor

from eqvae.artifacts.files import read_journal
from eqvae.autoencoders import build_autoencoder
from eqvae.autoencoders.protocol import Autoencoder
from eqvae.drawing.folders import read_folders
from eqvae.drawing.panels import run_panels
from eqvae.errors import UserError
from eqvae.images import evaluation_batches, open_images
from eqvae.metrics.autoencoder import evaluate_autoencoder
from eqvae.metrics.measures import predicting_measures
from eqvae.networks.features import FeatureExtractor, Features
from eqvae.runs.finetune import FinetuneConfig, finetune, plan
from eqvae.runtime.processes import Processes
from eqvae.runtime.run_folder import from_flat


def configure(folder: Path, data: Path, **changes) -> FinetuneConfig:
    quick = {
        "image_size": 64, "batch_size": 2, "max_steps": 2, "log_every": 1, "num_workers": 0, "perceptual": "none",
        "adversarial_weight": 0.0, "num_validation_images": 2, "num_statistics_images": 2, "device": "cpu",
        "validation_data": str(data),
    }  # fmt: skip
    return from_flat(FinetuneConfig, autoencoder="small", data=str(data), out=folder / "run", **(quick | changes))


class MeanColour(FeatureExtractor):
    """Three features: the mean of each colour."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.weights_fingerprint = "efficientnet-lite0", "0" * 16

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        return Features(pooled=images.float().mean((2, 3)))


def test_predictors_are_watched(tmp_path, photographs, small_autoencoder, monkeypatch):
    """The last validation, the report's curves, TensorBoard; and what an evaluation of the result says."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("eqvae.runs.finetune.load_features", lambda name: MeanColour())
    config = configure(
        tmp_path, photographs, watch="ifid, spectrum,dimension", num_validation_images=5, tensorboard=True
    )
    figures = finetune(config, small_autoencoder)
    watched = {"ifd_efficientnet_lite0", "spectrum_excess_db", "intrinsic_dimension"}
    validations = [record for record in read_journal(config.out) if record["kind"] == "validation"]
    assert [record["step"] for record in validations] == [0, 1, 2]
    assert all(watched <= set(record) for record in validations)
    assert {name: figures[name] for name in watched} == {name: validations[-1][name] for name in watched}
    assert {f"before_{name}" for name in watched} <= set(figures)
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/l1")] == [1, 2]
    assert [event.step for event in events.Scalars("validation/ifd_efficientnet_lite0")] == [0, 1, 2]
    (run,) = read_folders([config.out])[1]
    titles = {panel.title for panel in run_panels(run)["Validation"]}
    assert {"iFD (efficientnet-lite0) ↓", "Intrinsic dimension ↓", "Spectrum excess ↓"} <= titles
    measures = predicting_measures(("spectrum",), None, batch_size=2)
    images = evaluation_batches(
        open_images(str(photographs)), image_size_px=64, batch_size=2, num_images=5, num_workers=0, spread=True
    )
    alone = Processes(rank=0, count=1, device=torch.device("cpu"))
    found, _, _ = evaluate_autoencoder(
        load_exported(config, small_autoencoder), (batch.images for batch in images), processes=alone, measures=measures
    )  # fmt: skip
    assert found["spectrum_excess_db"] == pytest.approx(figures["spectrum_excess_db"], rel=0.05)  # bf16 in the run


def load_exported(config: FinetuneConfig, like: Autoencoder) -> Autoencoder:
    """What a run of the small autoencoder left, which `SmallAutoencoder.save` writes by torch."""
    exported = type(like)()
    exported.load_state_dict(torch.load(config.out / "autoencoder" / "weights.pt", weights_only=True))
    return exported


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"watch": "ifid,spectra"}, "--watch does not know 'spectra'. Did you mean 'spectrum'"),
        ({"watch": "dimension"}, "--watch dimension needs 3 images or more, and validation has 2"),
    ],
)
def test_what_can_not_be_watched_is_refused(tmp_path, photographs, small_autoencoder, changes, says):
    with pytest.raises(UserError, match=says):
        finetune(configure(tmp_path, photographs, **changes), small_autoencoder)
    assert not (tmp_path / "run").exists()


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
    assert plan(configure(tmp_path, tmp_path, image_size=512), autoencoder)["memory_gib"] > figures["memory_gib"]
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
