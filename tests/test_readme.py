"""What the README says is true: its commands and its snippet run, its map and its figures are those of the project."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from eqvae.cli import parse, run
from eqvae.evidence.speed_up import SeedCurves, headline
from eqvae.paper.headline import readme_rows
from eqvae.runs.adapt import AdaptConfig
from eqvae.runs.compare import CompareConfig
from eqvae.runs.convert import ConvertConfig
from eqvae.runs.push import PushConfig
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
    configs = {
        "compare": CompareConfig,
        "rank": RankConfig,
        "convert": ConvertConfig,
        "push": PushConfig,
        "adapt": AdaptConfig,
    }
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


def test_the_map_shows_every_package():
    listed = set(re.findall(r"(?m)(?:^|\s)([a-z_]+(?:/|\.py))\s", block_with("evidence/").replace("src/eqvae/", "")))
    source = ROOT / "src" / "eqvae"
    packages = {f"{path.parent.name}/" for path in source.glob("*/__init__.py")}
    modules = {path.name for path in source.glob("*.py") if not path.name.startswith("__") and path.stem != "errors"}
    assert listed == packages | modules


def test_it_is_short():
    assert len(README.splitlines()) <= 160


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
    lines = (ROOT / "src" / "eqvae" / "equivariance.py").read_text().splitlines()
    assert len(lines) < 150


def test_public_names_can_be_imported():
    import eqvae

    for name in eqvae.__all__:
        assert getattr(eqvae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = eqvae.nonsense


# Figures ------------------------------------------------------------------------------------------------------------


def results(name: str) -> dict:
    return json.loads((ROOT / "docs" / "results" / name).read_text())


HEADLINE = ROOT / "docs" / "results" / "small" / "headline.json"


@pytest.mark.skipif(not HEADLINE.exists(), reason="the small scale's learning curves are not finished")
def test_the_headline_is_measured():
    figures = json.loads(HEADLINE.read_text())
    rows = readme_rows(figures)
    assert rows and all(row in README for row in rows)


def test_the_speed_ups_are_measured():
    curves = [
        SeedCurves(
            seeds=tuple(arm["seeds"]),
            positions=np.array([run["num_images"] for run in arm["runs"]], dtype=np.float64),
            values=np.array([run["values"] for run in arm["runs"]]),
        )
        for arm in results("tiny/sit/comparison.json")["arms"]
    ]
    found = headline(*curves, None)
    shown = f"**{found.ratio:.2f} times** ({found.interval.low:.2f} to {found.interval.high:.2f})"
    assert f"SiT, CIFAR-10 | the base's quality after {shown}" in README
    repa = (ROOT / "docs" / "results" / "tiny" / "figure1" / "repa-sit" / "comparison.md").read_text()
    pattern = r"([\d.]+) times as fast in images \(95%: [^;]*; seeds: ([\d.]+) to ([\d.]+)"
    ratio, low, high = map(float, re.search(pattern, repa).groups())
    spread = stats.ttest_1samp(np.log([low, high, high]), 0.0).confidence_interval(0.95)  # the widest of three seeds
    factor = np.exp((spread.high - spread.low) / 2)
    shown = f"**{ratio} times** ({ratio / factor:.2f} to {ratio * factor:.2f}) fewer images"
    assert f"SiT + REPA, CIFAR-10 | after {shown}" in README


@pytest.mark.parametrize(("generator", "base"), [("DiT", "tiny-kl-64"), ("MaskGIT", "tiny-vq")])
def test_the_distances_are_measured(generator, base):
    rows = {row["here"]: row["figures"]["gfid"]["here"] for row in results("tiny/table1.json")["rows"]}
    assert f"| {generator}, CIFAR-10 | distance {rows[base]:.1f} -> {rows[f'{base}+eq']:.1f}" in README


@pytest.mark.parametrize(
    "names", [("elastic", "se", "plain + vf"), ("eq", "dsm"), ("detok",)], ids=["ahead", "behind", "ruined"]
)
def test_the_ranking_is_measured(names):
    ranked = {row["autoencoder"]: row for row in results("methods/ranking.json")["ranking"]}
    rows = [line.split("|") for line in README.splitlines() if line.startswith(f"| `{names[0]}`")]
    (cells,) = (row for row in rows if len(row) == 8)
    keys = ("equivariance_error_rotation", "equivariance_error_scale", "rfd_efficientnet_lite0")
    assert cells[2].strip() == ", ".join(f"{ranked[name]['distance']:.1f}" for name in names)
    for cell, key, digits in zip(cells[4:], keys, (2, 2, 1), strict=False):
        assert cell.strip() == ", ".join(f"{ranked[name]['predictors'][key]:.{digits}f}" for name in names)


@pytest.mark.parametrize("after", ["eq-decoder", "eq"])
def test_the_errors_are_measured(after):
    base, tuned = results("taef2/base.json"), results(f"taef2/{after}.json")
    rotation, scale, psnr = (
        f"{base[name]:.2f} -> {tuned[name]:.2f}"
        for name in ("equivariance_error_rotation", "equivariance_error_scale", "psnr_db")
    )
    assert f"| {rotation} | {scale} | {psnr} dB |" in README


def test_the_step_is_measured():
    step = results("benchmarks/finetune_step.json")
    assert f"**{step['times_faster']:.1f} times** as fast" in README
    assert f"in {step['times_peak_memory']:.2f} times the memory" in README
