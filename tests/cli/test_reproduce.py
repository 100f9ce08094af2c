"""`eqvae reproduce` from the command line: plans, wrong input in one line, nothing written too early."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqvae.artifacts.files import read_json, write_json
from eqvae.cli import run
from eqvae.paper.costs import Cost
from eqvae.paper.plan import PlannedRun
from eqvae.runtime.run_folder import flat

BASES = [
    "--autoencoder", "tiny-kl=untrained:tiny-kl", "--autoencoder", "tiny-vq=untrained:tiny-vq",
]  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of 32 px in two class folders."""
    random = np.random.default_rng(0)
    for index in range(4):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def arguments(images: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes a command line with data and bases; later flags win."""

    def make(*items: str, more: tuple[object, ...] = (), data: bool = True) -> list[str]:
        own = ["--data", str(images), "--reference-data", str(images), *BASES] if data else []
        return ["reproduce", *items, "--out", str(tmp_path / "root"), "--scale", "tiny", *own, *map(str, more)]

    return make


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are only pretended; this lists them."""
    names: list[str] = []

    def pretend(planned: PlannedRun) -> None:
        names.append(planned.name)
        write_json(planned.folder / "config.json", flat(planned.resolved()) | {"command": planned.command})
        write_json(planned.folder / "metrics.json", {"latent_std": 2.0, "fd_efficientnet_lite0": 50.0 + len(names)})

    monkeypatch.setattr("eqvae.paper.execution.perform", pretend)
    return names


def test_a_table(arguments, tmp_path: Path, performed: list[str], capsys):
    assert run(arguments("table8", more=("--seeds", 2))) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}/root/table8.md\n"
    assert captured.err.startswith("run 1 of ")
    assert read_json(tmp_path / "root" / "config.json")["command"] == "reproduce"
    count = len(performed)
    assert run(arguments("table8", "table8", more=("--seeds", 2))) == 0
    assert len(performed) == count
    record = read_json(tmp_path / "root" / "table8.json")
    assert [row["label"] for row in record["rows"]] == ["0.3", "0.5", "0.7"]
    assert record["rows"][0]["figures"]["gfid"]["num_seeds"] == 2


@pytest.fixture
def at_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs take seconds to count, and are tested elsewhere."""
    cost = Cost(bf16_flops=2e12, disk_bytes=3_000_000)
    monkeypatch.setattr("eqvae.paper.costs.estimate", lambda planned, setting: cost)


@pytest.mark.usefixtures("at_no_cost")
def test_a_dry_run_writes_nothing(arguments, tmp_path: Path, performed: list[str], capsys):
    assert run(arguments("table5", "table8", more=("--dry-run", "--device-name", "cpu", "--seeds", 1))) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["run", "state", "for", "FLOPs", "cpu", "hours", "disk"]
    assert not (tmp_path / "root").exists()
    assert performed == []
    (shared,) = [line for line in printed if "finetune autoencoders/tiny-kl+eq " in line]
    assert "to do  table5,table8" in shared
    count = len(printed) - 3
    total = [f"{2e12 * count:.2e}", f"{count * 2e12 / (1.37e12 * 0.12 * 3600):.3g}", f"{3 * count}", "MB"]
    assert printed[-1].split() == ["all", str(count), "runs", *total]


@pytest.mark.usefixtures("at_no_cost")
def test_a_dry_run_needs_no_data(arguments, tmp_path: Path, capsys):
    for scale in ("tiny", "small", "paper"):
        assert run(arguments("table6", data=False, more=("--scale", scale, "--dry-run"))) == 0
        assert "h100 hours" in capsys.readouterr().out
    assert not (tmp_path / "root").exists()


@pytest.mark.usefixtures("at_no_cost")
def test_a_dry_run_knows_what_is_done(arguments, performed: list[str], capsys):
    flags = ("--seeds", 1)
    assert run(arguments("table8", more=flags)) == 0
    capsys.readouterr()
    assert run(arguments("table5", more=(*flags, "--dry-run"))) == 0
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[1]: line for line in lines[1:-2]}
    assert " done " in states["autoencoders/tiny-kl+eq"]
    assert " to do " in states["autoencoders/tiny-kl+rotation"]
    assert lines[-2].startswith(f"{sum(' to do ' in line for line in lines[1:-2])} runs to do")


@pytest.mark.usefixtures("at_no_cost")
def test_all_is_all(arguments, capsys):
    assert run(arguments("all", more=("--dry-run", "--seeds", 1))) == 0
    shared = next(line for line in capsys.readouterr().out.splitlines() if "evaluate evaluations/tiny-kl " in line)
    assert "table1,table5,table6,table7,table12,figure1,figure2,figure3,figure6" in shared


def test_further_rows(arguments, tmp_path: Path, performed: list[str]):
    assert run(arguments("table12", more=("--autoencoder", "mine=untrained:tiny-kl"))) == 0
    record = read_json(tmp_path / "root" / "table12.json")
    assert record["rows"][-1]["label"] == "mine"
    assert "evaluations/mine" in performed


WRONG = [
    (("table13",), (), "Did you mean 'table"),
    (("figur1",), (), "Did you mean 'figure1'?"),
    ((), (), "no item is named"),
    (("table5",), ("--scale", "huge"), "huge"),
    (("table5",), ("--seeds", "0"), "--seeds is 0"),
    (("table5",), ("--data", "no/such"), "no/such"),
    (("table5",), ("--reference-data", "no/such"), "no/such"),
    (("table5",), ("--finetune-data", "no/such"), "no/such"),
    (("table5",), ("--autoencoder", "no/such.ckpt"), "no/such.ckpt"),
    (("table5",), ("--autoencoder", "mine=no/such.ckpt"), "no/such.ckpt"),
    (("table5",), ("--autoencoder", "tiny-kl=untrained:tiny-kl"), "two autoencoders are called 'tiny-kl'"),
    (("table5",), ("--autoencoder", "=x"), "NAME=PATH"),
    (("table5",), ("--device", "nonsense"), "nonsense"),
    (("table5",), ("--scale", "paper"), "--finetune-data"),
    (("table5",), ("--dry-run", "--device-name", "h1000"), "Did you mean 'h100'?"),
    (("table5",), ("--dri-run",), "Did you mean '--dry-run'?"),
]


@pytest.mark.parametrize(("items", "more", "what"), WRONG)
def test_wrong_input_is_one_line(arguments, tmp_path: Path, capsys, items, more, what: str):
    assert run(arguments(*items, more=more)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("eqvae: ")
    assert what in line
    assert captured.out == ""
    assert not (tmp_path / "root").exists()


def test_a_root_that_is_something_else(arguments, tmp_path: Path, capsys):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "thesis.tex").write_text("years of work")
    assert run(arguments("table5")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no 'eqvae reproduce' run" in line
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["thesis.tex"]


def test_a_run_that_fails_is_named(arguments, monkeypatch, capsys):
    from eqvae.errors import UserError

    def fail(planned: PlannedRun) -> None:
        raise UserError("the loss became NaN at step 3", "Lower --learning-rate")

    monkeypatch.setattr("eqvae.paper.execution.perform", fail)
    assert run(arguments("table5")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "eqvae: run 'evaluations/tiny-kl': the loss became NaN at step 3. Lower --learning-rate"


def test_what_changed_since(arguments, images: Path, tmp_path: Path, performed: list[str], capsys):
    assert run(arguments("table8", more=("--seeds", 1))) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    other.symlink_to(images)
    assert run(arguments("table8", more=("--seeds", 1, "--data", other))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a run with --data" in line
