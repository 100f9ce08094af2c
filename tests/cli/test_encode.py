"""`eqvae encode` from end to end, and wrong input in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.artifacts.files import read_json
from eqvae.cli import run
from eqvae.latents.cache import LatentCache

ENCODE = [
    "--image-size", "32", "--batch-size", "4", "--shard-size", "6", "--precision", "fp32", "--device", "cpu",
    "--num-workers", "0",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty images in two class folders."""
    random = np.random.default_rng(0)
    for index in range(20):
        path = tmp_path / "data" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["encode", "untrained:tiny-kl", "--data", str(data), "--out", str(out), *ENCODE, *more]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_encoding(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    assert run(arguments(data, out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("20 images at ")
    assert f"cache in '{out}'" in printed
    cache = LatentCache.open(out)
    cache.verify()
    assert (len(cache), cache.latent_shape, cache.index.class_names) == (20, (4, 4, 4), ("a", "b"))
    assert read_json(out / "config.json")["command"] == "encode"
    assert run(arguments(data, out)) == 0  # checks what is there
    (out / "shard-00002.safetensors").write_bytes(b"")
    assert run([*cache.index.rebuild_command(out).split()[1:], "--device", "cpu", "--num-workers", "0"]) == 0
    LatentCache.open(out).verify()


def test_a_folder_that_another_process_writes_into(data: Path, tmp_path: Path, refused_while_held) -> None:
    refused_while_held(arguments(data, tmp_path / "cache"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("more", "what"),
    [(("--dtype", "float8"), "float8"), (("--image-size", "33"), "not divisible by the stride 8. Use 32 or 40"),
     (("--label-column", "label"), "is no table"), (("--num-images", "21"), "more than the 20 images"),
     (("--shard-size", "0"), "--shard-size is 0"), (("--mirrored",), "Did you mean '--mirror'?")],
)  # fmt: skip
def test_wrong_input_is_one_line(data: Path, tmp_path: Path, capsys, more: tuple[str, ...], what: str) -> None:
    assert run(arguments(data, tmp_path / "out", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eqvae: ")
    assert what in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(data, data)) == 2
    assert "exists and holds no 'eqvae encode' run" in capsys.readouterr().err


def test_a_cache_is_no_autoencoder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(data, tmp_path / "cache")) == 0
    capsys.readouterr()
    assert run(["evaluate", str(tmp_path / "cache"), "--data", "photos", "--out", str(tmp_path / "out")]) == 2
    assert "was written by 'eqvae encode' and holds no autoencoder" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(data: Path, tmp_path: Path) -> None:
    assert run(arguments(data, tmp_path / "one")) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eqvae"]
    done = subprocess.run(
        [*launch, *arguments(data, tmp_path / "two")], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cache in") == 1
    assert len(shards(tmp_path / "one")) == 4
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    indices = [(tmp_path / name / "index.json").read_bytes() for name in ("one", "two")]
    assert indices[0] == indices[1]


@pytest.mark.slow
def test_sigterm_exits_with_130_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    assert run(arguments(data, tmp_path / "whole", "--shard-size", "1", "--image-size", "128")) == 0
    command = arguments(data, tmp_path / "out", "--shard-size", "1", "--image-size", "128")
    process = subprocess.Popen([sys.executable, "-m", "eqvae", *command], stderr=subprocess.PIPE, text=True)
    first = tmp_path / "out" / "shard-00000.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "eqvae: interrupted, SIGTERM; the same command goes on" in said
    assert first.exists()
    assert not (tmp_path / "out" / "index.json").exists()
    assert run(command) == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
