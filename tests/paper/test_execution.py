"""Going through plans: each run once, whoever takes it; resumption; tables of what is there."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from eqvae.artifacts.files import read_json, write_json
from eqvae.autoencoders import build_autoencoder
from eqvae.errors import Interrupted, UserError
from eqvae.paper.execution import execute, lock_path
from eqvae.paper.plan import Plan, PlannedRun
from eqvae.paper.setting import Setting
from eqvae.paper.tables import table5, table8
from eqvae.runs.reproduce import ReproduceConfig, reproduce
from eqvae.runtime.processes import Processes
from eqvae.runtime.run_folder import change_flat
from eqvae.runtime.signals import stop_on_signals

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


@pytest.fixture
def plan(setting: Setting) -> Plan:
    return Plan.of(table5(setting).runs)


def test_each_run_is_done_once_and_after_what_it_needs(plan: Plan, setting: Setting, performed: list[str]):
    after = []
    done = execute(plan, setting.root, ALONE, after_each=lambda run: after.append(run.name))
    assert done == performed == after == [run.name for run in plan.runs]
    assert execute(plan, setting.root, ALONE) == []
    assert len(performed) == len(plan.runs)


def test_a_second_table_takes_what_is_there(plan: Plan, setting: Setting, performed: list[str]):
    execute(plan, setting.root, ALONE)
    more = execute(Plan.of(table8(setting).runs), setting.root, ALONE)
    assert {name.partition("+")[2].partition("/")[0] for name in more} == {"eq-p0.3", "eq-p0.7"}


def test_takers_share_the_runs(plan: Plan, setting: Setting, performed: list[str]):
    shares: list[list[str]] = []
    takers = [
        threading.Thread(target=lambda: shares.append(execute(plan, setting.root, ALONE))) for _ in range(4)
    ]  # fmt: skip
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    assert Counter(performed) == Counter(run.name for run in plan.runs)
    assert sorted(name for share in shares for name in share) == sorted(performed)
    places = {name: place for place, name in enumerate(performed)}
    for run in plan.runs:
        assert all(places[need.name] < places[run.name] for need in run.needs)


def test_a_taken_run_is_passed_over_and_waited_for(plan: Plan, setting: Setting, performed: list[str]):
    first = plan.runs[0]
    path = lock_path(setting.root, first)
    path.parent.mkdir(parents=True)
    with FileLock(path):
        taker = threading.Thread(target=lambda: execute(plan, setting.root, ALONE))
        taker.start()
        while len(performed) < len(plan.runs) - 1:
            time.sleep(0.01)
        assert taker.is_alive()
        assert first.name not in performed
    taker.join()
    assert performed[-1] == first.name


def test_a_failure_names_the_run(plan: Plan, setting: Setting, monkeypatch):
    def fail(run: PlannedRun) -> None:
        raise UserError("the disk is full", "Make room")

    monkeypatch.setattr("eqvae.paper.execution.perform", fail)
    with pytest.raises(UserError, match=r"^run 'evaluations/tiny-kl-f2': the disk is full. Make room$"):
        execute(plan, setting.root, ALONE)
    FileLock(lock_path(setting.root, plan.runs[0])).acquire(timeout=0)  # it was let go


def test_an_interruption_goes_on(plan: Plan, setting: Setting, performed: list[str], monkeypatch):
    from eqvae.paper import execution

    pretend = execution.perform

    def stop_at_third(run: PlannedRun) -> None:
        if len(performed) == 2:
            raise Interrupted("SIGTERM at step 7; the same command goes on")
        pretend(run)

    monkeypatch.setattr(execution, "perform", stop_at_third)
    with pytest.raises(Interrupted, match=f"in run '{plan.runs[2].name}': SIGTERM at step 7"):
        execute(plan, setting.root, ALONE)
    monkeypatch.setattr(execution, "perform", pretend)
    execute(plan, setting.root, ALONE)
    assert Counter(performed) == Counter(run.name for run in plan.runs)


def test_sigterm_between_safe_points(plan: Plan, setting: Setting, monkeypatch):
    monkeypatch.setattr("eqvae.paper.execution.perform", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        execute(plan, setting.root, ALONE)
    assert signal.getsignal(signal.SIGTERM) is former


@pytest.mark.parametrize("taken_for", [ValueError, UserError])
def test_sigterm_that_a_library_takes_for_an_error(plan: Plan, setting: Setting, monkeypatch, taken_for):
    def swallow(run: PlannedRun) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise taken_for("could not determine the shape of object type") from None

    monkeypatch.setattr("eqvae.paper.execution.perform", swallow)
    with pytest.raises(Interrupted, match="in run '.*': SIGTERM"):
        execute(plan, setting.root, ALONE)


def test_sigterm_that_a_library_swallows_stops_the_next_loop(plan: Plan, setting: Setting, monkeypatch):
    def swallow(run: PlannedRun) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with stop_on_signals() as stop:
            raise Interrupted(f"{stop.signal_name} at step 0")

    monkeypatch.setattr("eqvae.paper.execution.perform", swallow)
    with pytest.raises(Interrupted, match="in run '.*': SIGTERM at step 0"):
        execute(plan, setting.root, ALONE)
    with stop_on_signals() as stop:
        assert not stop


def test_another_run_in_the_folder(plan: Plan, setting: Setting, performed: list[str]):
    execute(plan, setting.root, ALONE)
    plan.check_saved()
    other = replace(setting, finetuning=change_flat(setting.finetuning, learning_rate=0.1, num_workers=3))
    with pytest.raises(UserError, match="--learning-rate 0.0005, and now it is 0.1"):
        Plan.of(table5(other).runs).check_saved()


def test_a_root_that_was_moved_holds_the_same_runs(plan: Plan, setting: Setting, performed: list[str]):
    execute(plan, setting.root, ALONE)
    setting.root.rename(moved := setting.root.with_name("moved"))
    there = Plan.of(table5(replace(setting, root=moved)).runs)
    there.check_saved()
    assert not there.unfinished


def test_what_had_only_begun_elsewhere_is_told_at_once(plan: Plan, setting: Setting, performed: list[str]):
    execute(plan, setting.root, ALONE)
    run = next(run for run in plan.runs if run.command == "train")
    (run.folder / "metrics.json").rename(run.folder / "checkpoint.safetensors")
    setting.root.rename(moved := setting.root.with_name("moved"))
    with pytest.raises(UserError, match="holds a run with --latents"):
        Plan.of(table5(replace(setting, root=moved)).runs).check_saved()


def test_a_base_that_was_changed_is_refused(setting: Setting, performed: list[str], tmp_path: Path):
    def planned(seed: int) -> Plan:
        base = setting.autoencoders["SD-VAE"]
        changed = replace(setting.base(base), architecture=build_autoencoder(base, seed=seed))
        return Plan.of(table5(replace(setting, bases=setting.bases | {base: changed})).runs)

    execute(plan := planned(0), setting.root, ALONE)
    for run in plan.runs:
        path = run.folder / "config.json"
        if run.command == "finetune":
            write_json(path, read_json(path) | {"base_fingerprint": run.architecture.fingerprint()})
    planned(0).check_saved()
    with pytest.raises(UserError, match="made with 'untrained:tiny-kl-f2' as it was then, and it has changed"):
        planned(1).check_saved()


def test_a_fine_tuning_that_was_done_anew_is_another(plan: Plan, setting: Setting, performed: list[str]):
    execute(plan, setting.root, ALONE)
    run = next(run for run in plan.runs if run.command == "encode" and run.needs)
    path = run.folder / "config.json"
    write_json(path, read_json(path) | {"fingerprint": "before"})
    card = Path(run.config.autoencoder) / "autoencoder" / "eqvae.json"
    write_json(card, {"fingerprint": "before"})
    plan.check_saved()
    write_json(card, {"fingerprint": "after"})
    with pytest.raises(UserError, match="has changed since"):
        plan.check_saved()


def test_too_small_images_are_told_before_anything_is_done(reproduce_smallest, setting: Setting, performed: list[str]):
    tuned = change_flat(setting.finetuning, adversarial_weight=0.5)
    small = replace(setting, finetuning=tuned)
    config = ReproduceConfig(items=("table5",), out=setting.root, device="cpu", scale="tiny")
    with pytest.raises(UserError, match=r"run 'autoencoders/.*': images of 16 px .* too small for the discriminator"):
        reproduce(config, {"tiny": small})
    assert not performed


# From the command's configuration ------------------------------------------------------------------------------------


@pytest.fixture
def reproduce_smallest(setting: Setting):
    """Reproduces items at the smallest scale."""

    def run(*items: str, seeds: tuple[int, ...] = (0, 1), **options) -> list[Path]:
        config = ReproduceConfig(items=items, out=setting.root, device="cpu", **{"scale": "tiny", **options})
        return reproduce(config, {"tiny": replace(setting, seeds=seeds)})

    return run


def test_paper_here_and_spread(reproduce_smallest, setting: Setting, performed: list[str]):
    markdown, record = reproduce_smallest("table5")
    content = read_json(record)
    row = {row["label"]: row["figures"] for row in content["rows"]}["S(s, s)"]
    measured = [read_json(setting.root / name / "metrics.json") for name in row["gfid"]["runs"]]
    values = [figures["fd_efficientnet_lite0"] for figures in measured]
    assert (row["gfid"]["paper"], row["gfid"]["values"], row["gfid"]["num_seeds"]) == (35.8, values, 2)
    assert row["gfid"]["here"] == pytest.approx(sum(values) / 2)
    assert row["gfid"]["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert row["rfid"]["spread"] is None
    assert row["gfid"]["difference"]["interval"]["low"] < row["gfid"]["difference"]["difference"]
    assert content["environment"]["commit"]
    text = markdown.read_text()
    assert f"| S(s, s) | tiny-kl-f2+scale | 35.8 | {sum(values) / 2:.2f} | {row['gfid']['spread']:.2f} (2) |" in text
    assert "gfd_efficientnet_lite0" in text
    assert "not shown at this scale" in text or "better" in text or "worse" in text
    assert "runs are finished" not in text


def test_tables_fill_while_runs_are_under_way(reproduce_smallest, setting: Setting, performed: list[str], monkeypatch):
    from eqvae.paper import execution

    pretend = execution.perform

    def stop_later(run: PlannedRun) -> None:
        if len(performed) == 9:
            raise Interrupted("SIGINT; the same command goes on")
        pretend(run)

    monkeypatch.setattr(execution, "perform", stop_later)
    with pytest.raises(Interrupted):
        reproduce_smallest("table5", "table8")
    text = (setting.root / "table5.md").read_text()
    assert "9 of 35 runs are finished" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| none (SD-VAE) ")]
    assert "(1) |" in row
    (missing,) = [line for line in text.splitlines() if line.startswith("| R(θ) · S(sx, sy) ")]
    assert missing.count("\N{EN DASH}") == 8
    monkeypatch.setattr(execution, "perform", pretend)
    reproduce_smallest("table5", "table8")
    assert len(performed) == len(set(performed)) == 35 + 14


def test_another_scale_below_the_same_root(reproduce_smallest, setting: Setting, performed: list[str]):
    reproduce_smallest("table8", seeds=(0,))
    config = read_json(setting.root / "config.json")
    write_json(setting.root / "config.json", config | {"scale": "paper"})
    with pytest.raises(UserError, match="holds runs of --scale paper, not tiny"):
        reproduce_smallest("table8")


def test_more_seeds_add_to_what_is_there(reproduce_smallest, performed: list[str]):
    reproduce_smallest("table8", seeds=(0,))
    before = len(performed)
    reproduce_smallest("table8", seeds=(0, 1))
    assert len(performed) == before + 6
    assert all(name.endswith("seed-1") for name in performed[before:])


# Real stages ---------------------------------------------------------------------------------------------------------


def test_a_whole_table(setting: Setting):
    config = ReproduceConfig(items=("table8", "figure2", "figure3"), out=setting.root, device="cpu", scale="tiny")
    files = reproduce(config, {"tiny": replace(setting, seeds=(0,), strengths=(0.5,))})
    content = read_json(setting.root / "table8.json")
    assert content["num_finished"] == content["num_runs"] == 7
    (row,) = content["rows"]
    assert all(figure["num_seeds"] == 1 for figure in row["figures"].values())
    ours = read_json(setting.root / "generators" / "dit-ti-2" / "tiny-kl-f2+eq" / "fixed" / "seed-0" / "config.json")
    std = read_json(setting.root / "latents" / "tiny-kl-f2" / "metrics.json")["latent_std"]
    assert ours["normalization"] == f"fixed:{1 / std:.6g}"
    drawn = [setting.root / name for name in ("figure2/s_0.5.png", "figure3/distances.svg", "figure3/distances.png")]
    assert set(drawn) < set(files)
    assert all(file.stat().st_size > 0 for file in drawn)


@pytest.mark.slow
def test_everything(reproduce_smallest, setting: Setting):
    files = reproduce_smallest("all", seeds=(0,))
    assert {file.name for file in files if file.suffix == ".md"} == {
        *(f"table{number}.md" for number in range(1, 13)), *(f"figure{number}.md" for number in range(1, 9)),
    }  # fmt: skip
    for number in range(1, 13):
        content = read_json(setting.root / f"table{number}.json")
        assert content["num_finished"] == content["num_runs"]
    for file in ("figure1/latents.png", "figure1/dit/comparison.md", "figure4/samples.png", "figure7/samples.png",
                 "figure6/tiny-kl-f2/90_degrees.png", "figure5/epochs.png"):  # fmt: skip
        assert (setting.root / file).stat().st_size > 0


# Processes of their own ----------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).with_name("reproduce_smallest.py")
PLAIN: list[str] = []
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def start(images: Path, tmp_path: Path):
    """Starts a process that reproduces items; each writes the runs that it does into one file."""

    def launch(*items: str, launcher: list[str] = PLAIN) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "EQVAE_TEST_COUNT": str(tmp_path / "count")}
        return subprocess.Popen(
            [sys.executable, *launcher, str(SCRIPT), str(images), str(tmp_path / "root"), *items],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    return launch


def counted(tmp_path: Path) -> list[tuple[str, str]]:
    """Process and run, in order."""
    path = tmp_path / "count"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split()[0], line.split()[1]) for line in lines]


@pytest.mark.slow
def test_two_processes_share_one_root(start, tmp_path: Path):
    processes = [start("table8"), start("table8")]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    names = [name for _, name in counted(tmp_path)]
    assert len(names) == len(set(names)) == read_json(tmp_path / "root" / "table8.json")["num_runs"]
    assert len({process for process, _ in counted(tmp_path)}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_reproduction_goes_on(start, tmp_path: Path, number: int):
    process = start("table8")
    while len(counted(tmp_path)) < 5:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 130, errors
        assert [line for line in errors.splitlines() if line.startswith("eqvae: interrupted, in run '")]
        assert "Traceback" not in errors
    broken_off = counted(tmp_path)[-1][1]
    again = start("table8")
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    count = Counter(name for _, name in counted(tmp_path))
    assert {name for name, times in count.items() if times > 1} <= {broken_off}
    content = read_json(tmp_path / "root" / "table8.json")
    assert content["num_finished"] == content["num_runs"]


@pytest.mark.slow
def test_two_processes_together_under_torchrun(start, tmp_path: Path):
    process = start("table8", launcher=TORCHRUN)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert printed.splitlines() == [str(tmp_path / "root" / "table8.md")]
    by_run = Counter(name for _, name in counted(tmp_path))
    assert set(by_run.values()) == {2}
    content = read_json(tmp_path / "root" / "table8.json")
    assert content["num_finished"] == content["num_runs"]
    assert json.loads((tmp_path / "root" / "config.json").read_text())["command"] == "reproduce"
