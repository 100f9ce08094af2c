"""Measures over sets of images: closed forms with features that can be read off, and the whole of `--all`."""

import pytest
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from eqvae.artifacts.files import read_json
from eqvae.errors import UserError
from eqvae.metrics.autoencoder import evaluate_autoencoder
from eqvae.metrics.measures import LatentGeometry, LatentSpectrum, ReconstructionDistance, TransformedDistance
from eqvae.metrics.per_image import evaluation_transforms
from eqvae.networks.features import FeatureExtractor, Features
from eqvae.runs.evaluate import EvaluateConfig, evaluate
from eqvae.runtime.processes import Processes

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


class MeanColour(FeatureExtractor):
    """Three features: the mean of each colour."""

    def __init__(self, name: str = "inception") -> None:
        super().__init__()
        self.name, self.weights_fingerprint = name, "0" * 16

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Features:
        return Features(pooled=images.float().mean((2, 3)))


def flat_cells(count: int = 6, side: int = 8) -> Tensor:
    """Images whose cells of 8 x 8 px are of one colour."""
    cells = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return cells.repeat_interleave(8, -1).repeat_interleave(8, -2)


def figures_of(autoencoder, x, *measures, size=2):
    return evaluate_autoencoder(autoencoder, x.split(size), processes=ALONE, measures=measures)[0]


def test_a_perfect_reconstruction_has_no_distance(averaging_autoencoder):
    figures = figures_of(averaging_autoencoder, flat_cells(), ReconstructionDistance(MeanColour()))
    assert figures["rfid"] == pytest.approx(0.0, abs=1e-8)


def test_the_distance_of_shifted_reconstructions_is_the_squared_shift(averaging_autoencoder):
    with torch.no_grad():
        averaging_autoencoder.layer.weight.mul_(0.0)
        averaging_autoencoder.layer.weight[torch.arange(3), torch.arange(3)] = 0.5
    x = flat_cells()
    figures = figures_of(averaging_autoencoder, x, ReconstructionDistance(MeanColour()))
    # y = x / 2 in [-1, 1]: means halve about 127.5, and so do deviations.
    pixels = ((x + 1) * 127.5).mean((2, 3)).double()
    shift = (pixels.mean(0) - 127.5) / 2
    deviation = torch.linalg.eigvalsh(torch.cov(pixels.T)).clamp(min=0).sqrt() / 2
    expected = float(shift.square().sum() + deviation.square().sum())
    assert figures["rfid"] == pytest.approx(expected, rel=0.02)  # 8 bits round


def test_other_features_name_the_figure(averaging_autoencoder):
    figures = figures_of(averaging_autoencoder, flat_cells(), ReconstructionDistance(MeanColour("efficientnet-lite0")))
    assert "rfd_efficientnet_lite0" in figures
    assert "rfid" not in figures


def test_figure_3_is_zero_for_an_equivariant_autoencoder_and_means_over_rotations(averaging_autoencoder):
    measure = TransformedDistance(ReconstructionDistance(MeanColour()), evaluation_transforms())
    figures = figures_of(averaging_autoencoder, flat_cells(), measure)
    assert {name for name in figures if name.startswith("rfid")} == {
        "rfid_scale_0.25", "rfid_scale_0.5", "rfid_scale_0.75", "rfid_rotation", "rfid_rotation_90",
        "rfid_rotation_180", "rfid_rotation_270",
    }  # fmt: skip
    assert figures["rfid_rotation"] == pytest.approx(0.0, abs=1e-8)
    rotations = [figures[f"rfid_rotation_{angle}"] for angle in (90, 180, 270)]
    assert figures["rfid_rotation"] == pytest.approx(sum(rotations) / 3)


def test_an_autoencoder_that_averages_has_no_excess_of_high_frequencies(averaging_autoencoder):
    measure = LatentSpectrum()
    figures = figures_of(averaging_autoencoder, flat_cells(), measure)
    assert figures["spectrum_excess_db"] == pytest.approx(0.0, abs=1e-6)
    curves = measure.curves()
    assert len(curves["frequency"]) == len(curves["latent_power"]) == len(curves["image_power"])


def test_ifid_of_pairs_of_equal_images_is_that_of_the_reconstructions(averaging_autoencoder):
    x = flat_cells().repeat_interleave(2, 0)  # each latent's nearest neighbour is its twin
    reconstruction = ReconstructionDistance(MeanColour())
    geometry = LatentGeometry(reconstruction, seed=0, batch_size=4)
    figures = figures_of(averaging_autoencoder, x, reconstruction, geometry)
    assert figures["ifid"] == pytest.approx(0.0, abs=1e-8)
    assert figures["intrinsic_dimension"] > 0


def test_figures_do_not_depend_on_the_batch_size(small_autoencoder):
    x = flat_cells(8)

    def measures():
        yield (reconstruction := ReconstructionDistance(MeanColour()))
        yield TransformedDistance(reconstruction, evaluation_transforms())
        yield LatentGeometry(reconstruction, seed=0, batch_size=3)
        yield LatentSpectrum()

    whole = figures_of(small_autoencoder, x, *measures(), size=8)
    parts = figures_of(small_autoencoder, x, *measures(), size=3)
    for name, value in whole.items():
        if name != "images_per_sec":
            assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-3), name


def test_evaluate_all_writes_every_figure_and_the_spectrum(tmp_path, photographs, small_autoencoder):
    config = EvaluateConfig(
        autoencoder="small", data=str(photographs), out=tmp_path / "out", image_size=64, lpips=False, num_workers=0,
        device="cpu", all=True, features="efficientnet-lite0",
    )  # fmt: skip
    figures = evaluate(config, small_autoencoder)
    for name in ("rfd_efficientnet_lite0", "rfd_efficientnet_lite0_scale_0.25", "rfd_efficientnet_lite0_rotation",
                 "ifd_efficientnet_lite0", "intrinsic_dimension", "spectrum_excess_db"):  # fmt: skip
        assert name in figures
    assert set(read_json(config.out / "spectrum.json")) == {"frequency", "latent_power", "image_power"}
    assert "intrinsic_dimension_standard_error" not in figures  # too few images for subsamples


def test_precision_is_that_of_the_features_too(averaging_autoencoder):
    class Dtypes(MeanColour):
        def forward(self, images):
            seen.append((images.float().mean((2, 3)) @ torch.eye(3)).dtype)
            return super().forward(images)

    seen: list[torch.dtype] = []
    for precision in ("fp32", "bf16"):
        reconstruction = ReconstructionDistance(Dtypes(), precision)
        figures_of(averaging_autoencoder, flat_cells(2), reconstruction, size=2)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_pictures_without_detail_leave_the_spectrum_out(tmp_path, small_autoencoder, capsys):
    for number in range(5):
        colour = torch.full((64, 64, 3), 40 * number, dtype=torch.uint8)
        Image.fromarray(colour.numpy()).save(tmp_path / f"{number}.png")
    config = EvaluateConfig(
        autoencoder="small", data=str(tmp_path), out=tmp_path / "out", image_size=64, lpips=False, num_workers=0,
        device="cpu", all=True, features="efficientnet-lite0",
    )  # fmt: skip
    assert "spectrum_excess_db" not in evaluate(config, small_autoencoder)
    assert "spectrum_excess_db is left out" in capsys.readouterr().err
    assert (config.out / "metrics.json").is_file()


def test_lpips_is_refused_below_what_it_sees(tmp_path, photographs, averaging_autoencoder):
    averaging_autoencoder.stride = 2
    config = EvaluateConfig(
        autoencoder="small", data=str(photographs), out=tmp_path / "out", image_size=8, lpips=True, device="cpu"
    )
    with pytest.raises(UserError, match="--lpips sees nothing of 8"):
        evaluate(config, averaging_autoencoder)
