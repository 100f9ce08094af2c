"""The programs in `examples/` run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def pictures(photographs: Path, tmp_path: Path) -> Path:
    """The six photographs in a class folder, as torchvision wants them."""
    (tmp_path / "pictures").mkdir()
    return photographs.rename(tmp_path / "pictures" / "any").parent


def run_example(name: str, *arguments: object) -> str:
    """Run one in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pytorch(pictures: Path, tmp_path: Path):
    import torch

    # Eight images make a batch: the six are given twice.
    (tmp_path / "pictures" / "other").symlink_to(pictures / "any")
    assert run_example("pytorch.py", pictures, tmp_path / "own.pt", 2).startswith("step 2: l1 ")
    assert "encoder.0.weight" in torch.load(tmp_path / "own.pt", weights_only=True)


@pytest.mark.slow
def test_diffusers(pictures: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    from eqvae import load_autoencoder

    load_autoencoder("untrained:tiny-kl").save(tmp_path / "base")
    said = run_example("diffusers_autoencoder.py", tmp_path / "base", pictures, tmp_path / "eq", 2)
    assert said.startswith("step 2: l1 ")
    vae = AutoencoderKL.from_pretrained(tmp_path / "eq")
    assert f"scaling factor {vae.config.scaling_factor:.3f}" in said


def test_the_examples_take_nothing_but_the_transforms():
    for path in EXAMPLES.glob("*.py"):
        imported = {line for line in path.read_text().splitlines() if line.startswith(("from eqvae", "import eqvae"))}
        assert imported == {"from eqvae.transforms import TransformSampler"}, path
