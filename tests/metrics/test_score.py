"""The score run: torch-fidelity's figures, any batch size and number of processes, every fault in one line."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image, ImageFilter
from torch_fidelity.metric_isc import isc_features_to_metric

from eqvae.artifacts.files import read_json
from eqvae.artifacts.sample_sets import write_sample_set
from eqvae.errors import UserError
from eqvae.images import adm_crop, open_images
from eqvae.images.image_sets import open_reference
from eqvae.metrics.comparison import check_comparable, score_features
from eqvae.metrics.statistics import FeatureStatistics, Provenance
from eqvae.networks.features import load_features
from eqvae.runs.score import ScoreConfig, _choose, score

SMALL, LITE = "test_resnet", "efficientnet_lite0"


def _crops(num_images, *, blur=0.0, size_px=48, seed=0):
    """Cut squares out of the built-in photographs."""
    random = np.random.default_rng(seed)
    source = open_images("photos")
    crops = []
    for index in range(num_images):
        image = source.read(index % len(source)).filter(ImageFilter.GaussianBlur(blur))
        left, top = (int(random.integers(side - 160)) for side in image.size)
        crops.append(adm_crop(image.crop((left, top, left + 160, top + 160)), size_px))
    return np.stack(crops)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Ten samples, blurred, as an archive, and a folder of twelve real images."""
    folder = tmp_path_factory.mktemp("sets")
    write_sample_set(folder / "samples.npz", _crops(10, blur=1.5, seed=1))
    (folder / "real").mkdir()
    for index, image in enumerate(_crops(12)):
        Image.fromarray(image).save(folder / "real" / f"{index:02}.png")
    return folder / "samples.npz", folder / "real"


@pytest.fixture
def config(sets, tmp_path, timm_weights) -> ScoreConfig:
    samples, reference = sets
    return ScoreConfig(
        samples=samples, reference=str(reference), out=tmp_path / "out", features=SMALL, weights=timm_weights,
        num_workers=0, device="cpu",
    )  # fmt: skip


@pytest.fixture
def lite(config) -> ScoreConfig:
    """With EfficientNet-Lite0's features."""
    return replace(config, features="efficientnet-lite0", weights=None)


def test_the_files_of_a_score(lite):
    figures = score(lite)
    assert read_json(lite.out / "metrics.json") == figures
    assert list(figures) == [
        f"fd_{LITE}", f"kd_{LITE}", f"kd_std_{LITE}", f"precision_{LITE}", f"recall_{LITE}", "num_samples",
        "num_reference", "provenance",
    ]  # fmt: skip
    assert figures[f"fd_{LITE}"] > 0
    assert (figures["num_samples"], figures["num_reference"]) == (10, 12)
    assert read_json(lite.out / "config.json")["command"] == "score"
    assert (lite.out / "environment.json").exists()
    provenance = figures["provenance"]
    assert len(provenance["samples"]["fingerprint"]) == 16
    assert provenance["reference"]["data"] == lite.reference
    assert provenance["reference"]["weights_fingerprint"] == load_features("efficientnet-lite0").weights_fingerprint
    assert provenance["reference"]["image_size_px"] == 48
    assert provenance["num_neighbours"] == 3
    assert (provenance["kid_subsets"], provenance["kid_subset_size"]) == (100, 10)
    assert provenance["left_out"] == []


def test_real_images_against_themselves_score_perfectly(config):
    figures = score(replace(config, samples=Path(config.reference)))
    assert figures[f"fd_{SMALL}"] == pytest.approx(0, abs=1e-8)
    assert figures[f"precision_{SMALL}"] == figures[f"recall_{SMALL}"] == 1
    provenance = figures["provenance"]
    assert provenance["samples"]["fingerprint"] == provenance["reference"]["fingerprint"]


@pytest.mark.parametrize("batch_size", [7])
def test_no_figure_depends_on_the_batch_size(lite, batch_size):
    expected = score(lite)
    _check_equal(score(replace(lite, batch_size=batch_size)), expected)


def _check_equal(figures, expected):
    assert figures["provenance"] == expected["provenance"]
    for name, value in expected.items():
        if isinstance(value, float) and not name.startswith(("precision", "recall")):
            assert figures[name] == pytest.approx(value, rel=1e-6, abs=1e-9)
        else:
            assert figures[name] == value  # counts, and shares that are counts


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 64])
def test_no_figure_depends_on_the_number_of_processes(lite, tmp_path, batch_size):
    expected = score(replace(lite, out=tmp_path / "alone"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eqvae"]
    arguments = [
        "score", lite.samples, "--reference", lite.reference, "--out", lite.out, "--features", lite.features,
        "--num-workers", 0, "--device", "cpu", "--batch-size", batch_size,
    ]  # fmt: skip
    done = subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"fd_{LITE}") == 1  # one process speaks
    _check_equal(read_json(lite.out / "metrics.json"), expected)


def test_saved_statistics_give_the_same_figures(config, tmp_path):
    saved = tmp_path / "reference.safetensors"
    expected = score(replace(config, save_reference=saved))
    again = replace(config, reference=str(saved), out=tmp_path / "again", save_reference=None)
    assert score(again) == expected


def test_a_part_of_the_images(config):
    figures = score(replace(config, num_images=4, num_reference=6))
    assert (figures["num_samples"], figures["num_reference"]) == (4, 6)


@pytest.mark.parametrize("wanted", [1, 5, 7, 11, 12])
def test_a_part_of_the_reference_is_spread_over_all_of_it(wanted, tmp_path):
    write_sample_set(tmp_path / "twelve.npz", np.zeros((12, 8, 8, 3), np.uint8))
    images = open_reference(str(tmp_path / "twelve.npz"), image_size_px=8)
    chosen = _choose(images, wanted, "--num-reference", spread=True)
    steps = np.diff([*chosen, 12])
    assert (len(chosen), chosen[0]) == (wanted, 0)
    assert steps.max() - steps.min() <= 1  # in a folder of class after class, each class has its share


@pytest.mark.slow
def test_half_precision_moves_figures_little(lite, tmp_path):
    expected = score(lite)
    figures = score(replace(lite, out=tmp_path / "half", precision="bf16"))
    assert figures[f"fd_{LITE}"] == pytest.approx(expected[f"fd_{LITE}"], rel=0.1)
    assert figures["provenance"]["samples"]["precision"] == "bf16"


# Inception ----------------------------------------------------------------------------------------------------------


def _inception_statistics(weights, images, name) -> FeatureStatistics:
    extractor = load_features("inception", weights=weights)
    features = extractor.extract(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert features.spatial is not None
    pooled, spatial = features.pooled.double(), features.spatial.double()
    return FeatureStatistics(
        mean=pooled.mean(0), covariance=pooled.T.cov(), spatial_mean=spatial.mean(0),
        spatial_covariance=spatial.T.cov(), pooled=features.pooled, logits=features.logits,
        provenance=Provenance(
            data=name, fingerprint="", features="inception", weights_fingerprint=extractor.weights_fingerprint,
            image_size_px=48,
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_figures_are_torch_fidelity_s(config, untrained_inception, tmp_path):
    config = replace(config, features="inception", weights=untrained_inception, num_images=10, num_reference=10)
    figures = score(config)
    folder = tmp_path / "fake"
    folder.mkdir()
    with np.load(config.samples) as arrays:
        for index, image in enumerate(arrays["arr_0"]):
            Image.fromarray(image).save(folder / f"{index}.png")
    real = tmp_path / "real"
    real.mkdir()
    twelve = sorted(Path(config.reference).iterdir())
    for path in (twelve[index * 12 // 10] for index in range(10)):  # spread over all of them
        (real / path.name).symlink_to(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch_fidelity.calculate_metrics(
            input1=str(folder), input2=str(real), isc=True, fid=True, kid=True, isc_splits=1, kid_subsets=1,
            kid_subset_size=10, cuda=False, verbose=False, cache=False, batch_size=4, save_cpu_ram=True,
            feature_extractor_weights_path=str(untrained_inception),
        )  # fmt: skip
    assert figures["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert figures["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert figures["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert figures["sfid"] > 0
    assert {"inception_score_std", "kid_std", "precision", "recall"} <= figures.keys()


@pytest.mark.slow
def test_inception_s_figures_and_adm_s_moments(untrained_inception, tmp_path):
    images = _crops(10, seed=3)
    statistics = _inception_statistics(untrained_inception, images[:5], "samples")
    reference = _inception_statistics(untrained_inception, images[5:], "reference")
    figures = score_features(samples=statistics, reference=reference, split_size=3)
    expected = isc_features_to_metric(statistics.logits[:3], splits=1)["inception_score_mean"]
    expected += isc_features_to_metric(statistics.logits[3:], splits=1)["inception_score_mean"]
    assert figures["inception_score"] == pytest.approx(expected / 2, rel=1e-9)
    assert figures["fid"] > 0
    moments = replace(
        reference, pooled=None, logits=None,
        provenance=replace(reference.provenance, moments="file", weights_fingerprint=None, image_size_px=None),
    )  # fmt: skip
    alone = score_features(samples=statistics, reference=moments, split_size=3)
    assert (alone["fid"], alone["sfid"]) == (figures["fid"], figures["sfid"])
    assert alone["inception_score"] == figures["inception_score"]
    assert alone["provenance"]["left_out"] == ["kid", "precision", "recall"]
    assert not {"kid", "precision", "recall", "num_reference"} & alone.keys()
    alone = score_features(samples=statistics, reference=replace(moments, spatial_mean=None, spatial_covariance=None))
    assert alone["provenance"]["left_out"] == ["kid", "precision", "recall", "sfid"]


@pytest.mark.slow
def test_an_adm_reference_batch(config, untrained_inception, tmp_path):
    """The file's moments give FID, its images precision and recall, as in ADM's evaluator."""
    config = replace(config, features="inception", weights=untrained_inception)
    images = np.stack([np.array(Image.open(path)) for path in sorted(Path(config.reference).iterdir())])
    known = _inception_statistics(untrained_inception, images, "reference")
    moments = {"mu": known.mean + 1, "sigma": known.covariance, "mu_s": known.spatial_mean}
    moments |= {"sigma_s": known.spatial_covariance}
    arrays = {name: value.numpy() for name, value in moments.items()}
    np.savez(tmp_path / "both.npz", arr_0=images, **arrays)
    np.savez(tmp_path / "moments.npz", **arrays)
    both = score(replace(config, reference=str(tmp_path / "both.npz"), out=tmp_path / "a"))
    alone = score(replace(config, reference=str(tmp_path / "moments.npz"), out=tmp_path / "b"))
    plain = score(config)
    assert both["fid"] == pytest.approx(alone["fid"], rel=1e-9)
    assert both["fid"] != pytest.approx(plain["fid"], rel=1e-3)
    assert both["sfid"] == pytest.approx(plain["sfid"], rel=1e-5)
    assert (both["precision"], both["recall"], both["kid"]) == (plain["precision"], plain["recall"], plain["kid"])
    assert "kid" not in alone
    assert both["provenance"]["reference"]["moments"] == "file"
    with pytest.raises(UserError, match="--num-reference 4 has no place"):
        score(replace(config, reference=str(tmp_path / "moments.npz"), num_reference=4, out=tmp_path / "c"))


def test_moments_of_another_precision(config, untrained_inception, tmp_path):
    np.savez(tmp_path / "both.npz", arr_0=_crops(5), mu=np.zeros(2048), sigma=np.eye(2048))
    config = replace(config, features="inception", weights=untrained_inception, reference=str(tmp_path / "both.npz"))
    with pytest.raises(
        UserError, match="both.npz' holds moments .* in fp32, the samples' in bf16. Use --precision fp32"
    ):
        score(replace(config, precision="bf16"))


# Output folders -----------------------------------------------------------------------------------------------------


def test_the_same_score_is_written_anew_and_another_is_refused(config, sets):
    score(config)
    assert score(replace(config, num_images=5))["num_samples"] == 5
    before = {path.name: path.read_bytes() for path in config.out.iterdir()}
    with pytest.raises(UserError, match=f"holds a score of samples '{config.samples}', not '{sets[1]}'"):
        score(replace(config, samples=sets[1]))
    with pytest.raises(UserError, match="not 'photos'"):
        score(replace(config, reference="photos"))
    with pytest.raises(UserError, match="'test_resnet', not 'inception'"):
        score(replace(config, features="inception"))
    assert {path.name: path.read_bytes() for path in config.out.iterdir()} == before


def test_a_kill_leaves_no_mixture(config, monkeypatch):
    score(config)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eqvae.runs.score.write_environment", die)
    with pytest.raises(KeyboardInterrupt):
        score(replace(config, num_images=5))
    assert not (config.out / "metrics.json").exists()


# Faults -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuses(config):
    """A function that scores with some fields changed, which must fail before anything is written."""

    def check(**changes: object) -> str:
        with pytest.raises(UserError) as caught:
            score(replace(config, **changes))
        assert not config.out.exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


def test_fewer_images_than_neighbours(refuses, config, tmp_path):
    assert "need at least 4" in refuses(num_images=3)
    assert "need at least 4" in refuses(num_reference=3)
    assert "need at least 11" in refuses(num_neighbours=10)
    write_sample_set(tmp_path / "few.npz", _crops(2))
    line = refuses(samples=tmp_path / "few.npz")
    assert "few.npz' gives 2 images" in line


def test_more_images_than_there_are(refuses):
    assert "--num-images 11 asks for more than the 10 images" in refuses(num_images=11)
    assert "--num-reference 13 asks for more than the 12 images" in refuses(num_reference=13)


def test_a_reference_that_does_not_vary(refuses, tmp_path):
    write_sample_set(tmp_path / "same.npz", np.repeat(_crops(1), 5, axis=0))
    assert "the features of the reference do not vary" in refuses(reference=str(tmp_path / "same.npz"))


def test_statistics_of_other_features(refuses, config, tmp_path, untrained_inception):
    saved = tmp_path / "reference.safetensors"
    score(replace(config, save_reference=saved, out=tmp_path / "first"))
    line = refuses(reference=str(saved), features="inception", weights=untrained_inception)
    assert "holds features of test_resnet, not of inception" in line
    assert "in fp32, the samples' in bf16" in refuses(reference=str(saved), precision="bf16")
    statistics = FeatureStatistics.load(saved)
    replace(statistics, provenance=replace(statistics.provenance, weights_fingerprint="f" * 16)).save(saved)
    assert "other weights" in refuses(reference=str(saved))
    replace(statistics, provenance=replace(statistics.provenance, image_size_px=64)).save(saved)
    assert "images of 64 px, the samples have 48 px" in refuses(reference=str(saved))


def test_moments_are_inception_s(refuses, tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert "holds features of inception" in refuses(reference=str(tmp_path / "adm.npz"))


def test_unknown_provenance_is_taken_to_agree():
    known = Provenance(data="a", fingerprint="", features="x", weights_fingerprint="1", image_size_px=8)
    check_comparable(samples=known, reference=replace(known, weights_fingerprint=None, image_size_px=None))


def test_where_a_reference_s_statistics_can_not_go(refuses, tmp_path):
    assert "must end in .safetensors" in refuses(save_reference=tmp_path / "reference.npz")
    (tmp_path / "model.safetensors").write_text("years of work")
    assert "exists and holds something else" in refuses(save_reference=tmp_path / "model.safetensors")
    assert "--save-reference" in refuses(save_reference=tmp_path / "model.safetensors" / "x.safetensors")


def test_samples_and_reference_can_not_change_places():
    with pytest.raises(TypeError):
        score_features(None, None)  # type: ignore[misc, arg-type]
