"""What the README says is true: its commands run, its snippet runs, its map shows every file."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from eqvae.cli import parse, run
from eqvae.runs.compare import CompareConfig
from eqvae.runs.convert import ConvertConfig
from eqvae.runs.rank import RankConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [re.sub(r"(?m)^    ", "", block) for block in re.findall(r"(?m)(?:^    .*\n(?:\n(?=    ))?)+", README)]


def block_with(text: str) -> str:
    (block,) = [block for block in BLOCKS if text in block]
    return block


def test_own_autoencoder_in_three_lines(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = block_with("eqvae finetune stab").splitlines()
    assert len(lines) == 3
    quick = {
        "finetune": "--max-steps 2 --image-size 64 --batch-size 2 --perceptual none --adversarial-weight 0 "
        "--num-validation-images 2 --num-statistics-images 2 --num-workers 0",
        "evaluate": "--image-size 64 --num-workers 0",
        "report": "",
    }
    for line in lines:
        for said, here in (
            ("stabilityai/sd-vae-ft-ema", "untrained:tiny-kl"),
            ("path/to/images", str(photographs)),
            ("path/to/other/images", str(photographs)),
        ):
            line = line.replace(said, here)
        _, command, *arguments = shlex.split(line)
        assert run([command, *arguments, *quick[command].split()]) == 0, line
    assert "<html" in Path("report.html").read_text()

    from diffusers import AutoencoderKL

    assert "AutoencoderKL.from_pretrained" in README
    vae = AutoencoderKL.from_pretrained("runs/eq/autoencoder")
    assert vae.config.scaling_factor > 0


def test_reproduce_compare_and_rank_are_understood(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs = {"compare": CompareConfig, "rank": RankConfig, "convert": ConvertConfig}
    for line in (block_with("eqvae reproduce table5") + block_with("eqvae convert runs")).splitlines():
        _, command, *arguments = shlex.split(line, comments=True)
        if command in configs:
            assert parse(configs[command], command, arguments) is not None
            continue
        data = [str(photographs) if argument.endswith(".parquet") else argument for argument in arguments]
        assert run([command, *data, "--dry-run"]) == 0
    assert "table5" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_transforms_in_an_own_loop():
    from eqvae.transforms import TransformSampler

    names = {
        "TransformSampler": TransformSampler,
        "x": torch.rand(2, 3, 64, 64),
        "z": torch.rand(2, 4, 8, 8),
        "decoder": lambda z: z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2),
        "reconstruction_loss": torch.nn.functional.l1_loss,
    }
    exec(block_with("TransformSampler()"), names)
    assert names["loss"].ndim == 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", block_with("make demo")):
        assert re.search(rf"(?m)^{target}:", makefile)


def test_the_map_shows_every_module():
    listed = set(re.findall(r"(?m)^\s+([\w/]+\.py)\s", block_with("transforms.py  ")))
    source = ROOT / "src" / "eqvae"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py") if path.name != "__init__.py"}
    assert modules == {name for name in listed if not name.startswith("benchmarks")}


def test_transforms_need_pytorch_alone():
    tree = ast.parse((ROOT / "src" / "eqvae" / "transforms.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom)
            else []
        )
    }  # fmt: skip
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_the_objective_is_one_short_file():
    lines = (ROOT / "src" / "eqvae" / "finetune" / "equivariance.py").read_text().splitlines()
    assert len(lines) < 150


def test_public_names_can_be_imported():
    import eqvae

    for name in eqvae.__all__:
        assert getattr(eqvae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = eqvae.nonsense
