"""Pictures of several shapes through the whole line: fine-tuned, encoded, modelled, drawn and scored."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae import cli
from eqvae.artifacts.files import read_journal, read_json
from eqvae.generators.checkpoints import read_card
from eqvae.latents.cache import LatentCache

pytestmark = pytest.mark.slow

QUICK = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures: wide ones, high ones and squares, in two classes."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    sizes = [(72, 110, 3), (110, 72, 3), (96, 96, 3), (100, 90, 3)]
    for index in range(12):
        path = folder / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        smooth = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        height, width, _ = sizes[index % 4]
        Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


def finetune(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "finetune", "untrained:tiny-kl", "--data", str(data), "--validation-data", str(data), "--out", str(out),
        "--image-size", "64", "--aspect-buckets", "--max-steps", "6", "--batch-size", "2", "--log-every", "1",
        "--adversarial-weight", "0", "--perceptual", "none", "--num-workers", "0", "--num-validation-images", "2",
        "--num-statistics-images", "4", "--learning-rate", "1e-4", "--checkpoint-every", "3", *QUICK, *more,
    ]  # fmt: skip


def run(*words: object) -> None:
    assert cli.run([str(word) for word in words]) == 0


def losses(out: Path) -> list[tuple[int, float, str]]:
    records = [record for record in read_journal(out) if record["kind"] == "train"]
    return [(record["step"], record.get("l1", record.get("loss")), record.get("transform", "")) for record in records]


def test_the_whole_line(pictures, tmp_path, capsys):
    tuned, latents, generator = tmp_path / "tuned", tmp_path / "latents", tmp_path / "generator"
    run(*finetune(pictures, tuned))
    (data,) = [record for record in read_journal(tuned) if record["kind"] == "data"]
    assert sum(bucket["num_images"] for bucket in data["buckets"]) == 12
    assert "cut to 3 images at 80x48, 6 images at 64, 3 images at 48x80 px (height x width)" in capsys.readouterr().err
    encode = ("encode", tuned, "--data", pictures, "--out", latents, "--image-size", "64", "--aspect-buckets")
    run(*encode, "--shard-size", 4, "--num-workers", 0, *QUICK)
    cache = LatentCache.open(latents)
    assert len(cache.shapes) > 2
    train = ("train", "dit-ti-2", "--latents", latents, "--out", generator, "--max-steps", 8, "--batch-size", 4)
    quick = ("--watch-steps", 2, "--num-watch-samples", 4, "--log-every", 1, *QUICK)
    run(*train, *quick, "--dry-run")  # which goes through a step of the largest shape
    run(*train, *quick, "--reference", pictures)
    card = read_card(generator)
    assert {tuple(shape) for shape in card.shapes} == {(shape.height, shape.width) for shape in cache.shapes}
    assert card.image_sizes()[0] == cache.index.image_size()
    for size, new in (("48x80", False), ("48x96", True)):
        samples = tmp_path / size
        draw = ("sample", generator, "--out", samples, "--num-samples", 6, "--num-steps", 2, "--image-size", size)
        capsys.readouterr()
        run(*draw, *QUICK)
        assert ("are new to it" in capsys.readouterr().err) == new
        with np.load(samples / "samples.npz") as archive:
            assert archive["arr_0"].shape == (6, *map(int, size.split("x")), 3)
        features = ("--features", "efficientnet-lite0", "--num-neighbours", 1, "--num-workers", 0)
        run("score", samples, "--reference", pictures, "--out", tmp_path / f"score-{size}", *features, *QUICK)
        assert read_json(tmp_path / f"score-{size}" / "metrics.json")["fd_efficientnet_lite0"] > 0
    assert cli.run([str(word) for word in (*draw[:-1], "50x80", *QUICK)]) == 2
    assert "--image-size 50x80 is not divisible" in capsys.readouterr().err
    assert cli.run([str(word) for word in (train[0], "repa-sit-ti-2", *train[2:], "--data", pictures)]) == 2
    assert "models latents of one shape" in capsys.readouterr().err


def test_one_rectangle(pictures, tmp_path):
    tuned, latents, generator = tmp_path / "tuned", tmp_path / "latents", tmp_path / "generator"
    sized = [word for word in finetune(pictures, tuned) if word != "--aspect-buckets"]
    sized[sized.index("64")] = "64x96"
    run(*sized, "--watch", "spectrum")
    run("encode", tuned, "--data", pictures, "--out", latents, "--image-size", "64x96", "--num-workers", 0, *QUICK)
    assert LatentCache.open(latents).latent_shape == (4, 8, 12)
    train = ("train", "sit-ti-4", "--latents", latents, "--out", generator, "--max-steps", 2, "--batch-size", 4)
    run(*train, "--watch-steps", 2, "--num-watch-samples", 4, *QUICK)
    run("sample", generator, "--out", tmp_path / "samples", "--num-samples", 4, "--num-steps", 2, *QUICK)
    with np.load(tmp_path / "samples" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (4, 64, 96, 3)
    evaluate = ("evaluate", tuned, "--data", pictures, "--image-size", "64x96", "--all", "--features")
    few = ("--num-images", 4, "--tile", 64, "--num-workers", 0, "--device", "cpu")
    run(*evaluate, "efficientnet-lite0", *few, "--out", tmp_path / "evaluation")
    run("report", tuned, generator, tmp_path / "samples", tmp_path / "evaluation", "--out", tmp_path / "page.html")


def test_a_killed_run_goes_on_with_its_buckets(pictures, tmp_path, forks):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    forks.run(1, finetune(pictures, whole))
    forks.run(1, finetune(pictures, killed), stop_at=4)
    forks.run(1, finetune(pictures, killed))
    assert losses(whole) == losses(killed)
    weights = "autoencoder/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (killed / weights).read_bytes()


def test_two_processes_cut_and_encode_as_one(pictures, tmp_path, forks):
    one, two = tmp_path / "one", tmp_path / "two"
    forks.run(1, finetune(pictures, one))
    forks.run(2, finetune(pictures, two))
    for (step, loss, tau), (_, other, same) in zip(losses(one), losses(two), strict=True):
        assert (other, same) == (pytest.approx(loss, rel=1e-4), tau), step
    encode = ("encode", "untrained:tiny-kl", "--data", pictures, "--image-size", "64", "--aspect-buckets")
    settings = ("--shard-size", "2", "--num-workers", "0", *QUICK, "--out")
    for count, name in ((1, "latents-1"), (2, "latents-2")):
        forks.run(count, [*encode, *settings, tmp_path / name])
    for path in sorted((tmp_path / "latents-1").glob("shard-*")):
        assert path.read_bytes() == (tmp_path / "latents-2" / path.name).read_bytes()
