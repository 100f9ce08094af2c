"""Atomic writes, checkpoints, journals, seeds, signals, progress."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from eqvae.artifacts.files import read_journal, read_json, replace_folder, write_atomically, write_json, write_tensors
from eqvae.artifacts.names import CHECKPOINT, CHECKPOINT_BEFORE, CONFIG, JOURNAL
from eqvae.errors import UserError, nearest_name
from eqvae.runtime.journal import Journal, Progress, say, write_environment
from eqvae.runtime.processes import ALONE
from eqvae.runtime.run_folder import RunFolder, hold_output_folder
from eqvae.runtime.seeds import generator_for
from eqvae.runtime.signals import stop_on_signals
from eqvae.training.checkpoints import (
    load_optimizer_tensors,
    optimizer_tensors,
    read_checkpoint,
    read_latest_checkpoint,
    sub_state,
    write_checkpoint,
)

# Atomic writes ------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "text"
    for content in ("first", "second"):
        write_atomically(path, lambda temporary, content=content: temporary.write_text(content))
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_are_not_written(tmp_path, value):
    path = tmp_path / "metrics.json"
    write_json(path, {"psnr_db": 30.0})
    with pytest.raises(UserError, match="'metrics.json' would hold 'of.psnr_db', which is not finite"):
        write_json(path, {"num": 3, "of": {"psnr_db": value}})
    assert read_json(path) == {"psnr_db": 30.0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\x00"])
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        read_json(tmp_path / "config.json")


# Checkpoints --------------------------------------------------------------------------------------------------------


def make_model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    # Channels-last and fused, as in training: the optimizer then walks through memory in the parameter's own layout.
    model.to(memory_format=torch.channels_last)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.5, 0.9), fused=True)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 4, 8, 8, generator=generator_for(7, step))).square().mean().backward()
    optimizer.step()


def test_a_checkpoint_brings_back_the_next_step_bit_for_bit(tmp_path):
    model, optimizer = make_model_and_optimizer()
    for step in range(3):
        take_step(model, optimizer, step)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= optimizer_tensors(optimizer, "optimizer")
    write_checkpoint(tmp_path, tensors, {"step": 3, "before": {"psnr_db": 20.5}}, rotate=True)

    loaded, numbers = read_checkpoint(tmp_path / CHECKPOINT)
    assert numbers == {"step": 3, "before": {"psnr_db": 20.5}}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    other, other_optimizer = make_model_and_optimizer()
    other.load_state_dict(sub_state(loaded, "model"))
    load_optimizer_tensors(other_optimizer, "optimizer", loaded)
    for step in (3, 4):
        take_step(model, optimizer, step)
        take_step(other, other_optimizer, step)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    ours, theirs = optimizer_tensors(optimizer, "o"), optimizer_tensors(other_optimizer, "o")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_without_its_optimizer_the_next_step_differs(tmp_path):
    model, optimizer = make_model_and_optimizer()
    take_step(model, optimizer, 0)
    other, other_optimizer = make_model_and_optimizer()
    other.load_state_dict(model.state_dict())
    take_step(model, optimizer, 1)
    take_step(other, other_optimizer, 1)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_prefixes_that_begin_alike_are_kept_apart():
    tensors = {"optimizer.0.step": torch.ones(()), "optimizer_of_another.0.step": torch.zeros(())}
    assert sub_state(tensors, "optimizer") == {"0.step": torch.ones(())}


@pytest.mark.parametrize("keep", [0, 5, 100, -20])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / CHECKPOINT
    write_checkpoint(tmp_path, {"a": torch.zeros(100)}, {"step": 1}, rotate=True)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="checkpoint.safetensors.*truncated"):
        read_checkpoint(path)


def write_two_checkpoints(folder: Path) -> tuple[bytes, bytes]:
    """Write those of steps 1 and 2; returns the files' bytes, the latest first."""
    for step in (1, 2):
        write_checkpoint(folder, {"a": torch.full((100,), float(step))}, {"step": step}, rotate=True)
    return (folder / CHECKPOINT).read_bytes(), (folder / CHECKPOINT_BEFORE).read_bytes()


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", *(f"bit {place}" for place in range(-400, 0, 57))])
def test_the_one_before_a_damaged_checkpoint_is_taken(tmp_path, damage):
    latest, _ = write_two_checkpoints(tmp_path)
    found = read_latest_checkpoint(tmp_path)
    assert (found.numbers["step"], found.tensors["a"][0], found.damage) == (2, 2.0, None)
    damaged = bytearray(latest if damage != "empty" else b"")
    if damage == "missing":
        (tmp_path / CHECKPOINT).unlink()
    elif damage.startswith("bit"):
        damaged[int(damage.split()[1])] ^= 16
        (tmp_path / CHECKPOINT).write_bytes(damaged)
    else:
        (tmp_path / CHECKPOINT).write_bytes(damaged[:-1])
    found = read_latest_checkpoint(tmp_path)
    assert (found.numbers["step"], found.tensors["a"][0]) == (1, 1.0)
    assert "checkpoint.safetensors' is " in found.damage


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    latest, _ = write_two_checkpoints(tmp_path)
    for place in range(len(latest)):
        damaged = bytearray(latest)
        damaged[place] ^= 1 << place % 8
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        assert read_latest_checkpoint(tmp_path).numbers["step"] == 1, place


def test_two_damaged_checkpoints_are_named(tmp_path):
    write_two_checkpoints(tmp_path)
    for name in (CHECKPOINT, CHECKPOINT_BEFORE):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors' is truncated.* and .*before\.safetensors' is trunc"):
        read_latest_checkpoint(tmp_path)


def test_a_checkpoint_without_a_digest_is_read(tmp_path):
    write_tensors(tmp_path / CHECKPOINT, {"a": torch.ones(3)}, {"numbers": '{"step": 7}'})
    assert read_latest_checkpoint(tmp_path).numbers == {"step": 7}


def test_weights_without_numbers_are_no_checkpoint(tmp_path):
    write_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="no checkpoint"):
        read_checkpoint(tmp_path / "weights.safetensors")


# Journals -----------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.write("train", step=step, l1=0.5 / step)
    path = tmp_path / JOURNAL
    path.write_text(path.read_text()[:-10])
    assert [record["step"] for record in read_journal(tmp_path)] == [1, 2]
    assert read_journal(tmp_path / "elsewhere") == []


def test_resuming_forgets_later_records_and_mends_a_torn_line(tmp_path):
    journal = Journal(tmp_path)
    for step in range(6):
        journal.write("train", step=step)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"kind": "train", "st')
    resumed = Journal(tmp_path, keep_up_to_step=3)
    assert [record["step"] for record in read_journal(tmp_path)] == [0, 1, 2, 3]
    resumed.write("train", step=4, again=True)
    assert read_journal(tmp_path)[-1] == {"kind": "train", "step": 4, "again": True}
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 5


def test_each_record_is_in_the_file_when_write_returns(tmp_path):
    journal = Journal(tmp_path)
    journal.write("validation", step=1, folder=tmp_path, figures=(1.0, 2.0))
    (line,) = (tmp_path / JOURNAL).read_text().splitlines()
    assert json.loads(line) == {"kind": "validation", "step": 1, "folder": str(tmp_path), "figures": [1.0, 2.0]}


def test_the_environment_names_versions_device_and_seed(tmp_path):
    write_environment(tmp_path, device=torch.device("cpu"), seed=3)
    environment = read_json(tmp_path / "environment.json")
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert environment["device"].startswith("cpu")
    assert environment["seed"] == 3


@pytest.mark.parametrize(
    ("folder", "is_checkout"),
    [("src", True), (".venv/lib/python3.11/site-packages", False), ("libs/src", False), ("lib", False)],
)
def test_only_a_checkout_of_this_project_has_a_commit(tmp_path, monkeypatch, folder, is_checkout):
    repository = tmp_path / "repository"
    module = repository / folder / "eqvae" / "runtime" / "journal.py"
    module.parent.mkdir(parents=True)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    monkeypatch.setattr("eqvae.runtime.journal.__file__", str(module))
    write_environment(tmp_path, device=torch.device("cpu"), seed=None)
    commit = read_json(tmp_path / "environment.json")["commit"]
    assert (commit is not None and len(commit) == 12) if is_checkout else commit is None


# Seeds --------------------------------------------------------------------------------------------------------------


def test_generators_depend_on_their_key_alone():
    def draw(*key: int) -> tuple[float, ...]:
        return tuple(torch.rand(4, generator=generator_for(*key)).tolist())

    torch.manual_seed(0)
    state = torch.get_rng_state()
    keys = [(seed, step, part) for seed in range(3) for step in range(10) for part in range(3)]
    forwards = {key: draw(*key) for key in keys}
    torch.manual_seed(1)
    backwards = {key: draw(*key) for key in reversed(keys)}
    assert forwards == backwards
    assert len(set(forwards.values())) == len(keys)
    torch.manual_seed(0)
    draw(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_neighbouring_generators_are_uncorrelated():
    draws = torch.stack([torch.randn(2000, generator=generator_for(0, step, 0)) for step in range(20)])
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 0.12
    first = torch.stack([torch.rand(1, generator=generator_for(0, step, 0)) for step in range(2000)])
    assert abs(first.mean().item() - 0.5) < 0.03


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_handlers_come_back(number):
    former = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with stop_on_signals() as stop:
        assert not stop
        assert signal.getsignal(number) != former[number]
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == number.name
        assert {each: signal.getsignal(each) for each in former} == former  # a second one acts as usual
    assert {each: signal.getsignal(each) for each in former} == former


def test_the_handlers_come_back_without_a_signal_and_after_an_error():
    former = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with stop_on_signals() as stop:
        pass
    assert not stop
    with pytest.raises(KeyError), stop_on_signals():
        raise KeyError
    assert {each: signal.getsignal(each) for each in former} == former


def test_a_second_interrupt_interrupts():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), stop_on_signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


def test_outside_the_main_thread_nobody_asks():
    found = []

    def work() -> None:
        with stop_on_signals() as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


# Progress -----------------------------------------------------------------------------------------------------------


def test_piped_progress_is_plain_lines(capsys):
    with Progress("finetune", total=4, start=1, every_sec=0.0) as progress:
        progress.advance(l1=0.25)
        say("step 2: PSNR 20 dB")
        progress.advance(2, l1=0.125)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("finetune: 2/4 steps, ")
    assert lines[0].endswith(" s left, l1 0.25")
    assert lines[1] == "step 2: PSNR 20 dB"
    assert lines[2].startswith("finetune: 4/4 steps, ")
    assert "0 s left" in lines[2]
    assert "\r" not in captured.err
    assert "\x1b" not in captured.err


def test_piped_progress_is_quiet_between_its_lines(capsys):
    with Progress("encode", total=1000, unit="image", every_sec=60.0) as progress:
        for _ in range(1000):
            progress.advance()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("encode: 1000/1000 images, ")


# Output folders -----------------------------------------------------------------------------------------------------


def test_a_new_and_an_empty_folder_are_free(tmp_path):
    assert RunFolder.claim(tmp_path / "new", "finetune").saved is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert RunFolder.claim(tmp_path / "empty", "finetune").saved is None


def test_a_folder_of_the_same_command_is_its_own(tmp_path):
    write_json(tmp_path / CONFIG, {"command": "finetune", "seed": 3})
    (tmp_path / CHECKPOINT).touch()
    assert RunFolder.claim(tmp_path, "finetune").saved == {"command": "finetune", "seed": 3}


def test_a_folder_without_a_result_is_nobodys(tmp_path):
    write_json(tmp_path / CONFIG, {"command": "train", "seed": 3})
    Journal(tmp_path).write("broken_image", name="a.png")
    for name in (".config.json.x1.part", "parts/.0.safetensors.x2.part", ".generator.part/ema.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = RunFolder.claim(tmp_path, "finetune")
    assert folder.saved is None
    with folder.hold(NoConfig(), ALONE, seed=None):
        assert {path.name for path in tmp_path.iterdir()} == {CONFIG, "environment.json", "parts"}
        assert read_json(tmp_path / CONFIG) == {"command": "finetune"}


def test_a_kill_during_the_first_write_leaves_a_free_folder(tmp_path):
    (tmp_path / ".config.json.abc.part").write_text('{"comm')
    assert RunFolder.claim(tmp_path, "finetune").saved is None


@dataclass(frozen=True, kw_only=True)
class NoConfig:
    """A command's configuration without a field."""


def test_a_folder_that_is_removed_is_not_made_again(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out' was removed or replaced while this run wrote into it"):  # noqa: SIM117
        with RunFolder.claim(out, "train").hold(NoConfig(), ALONE, seed=None):
            journal = Journal(out)
            shutil.rmtree(out)
            for write in (
                lambda: journal.write("train", step=1),
                lambda: write_json(out / "deep" / "metrics.json", {}),
                lambda: replace_folder(out / "generator", lambda part: None),
            ):
                with pytest.raises(UserError, match="was removed"):
                    write()
            assert not out.exists()
            out.mkdir()  # somebody else's
            write_json(out / "metrics.json", {})
    assert not any(out.iterdir())
    write_json(out / "metrics.json", {})  # nobody holds it any more


def test_a_folder_that_another_process_filled_meanwhile(tmp_path):
    folder = RunFolder.claim(tmp_path, "train")
    write_json(tmp_path / CONFIG, {"command": "train"})
    (tmp_path / CHECKPOINT).touch()
    with pytest.raises(UserError, match="Another process has been writing"), folder.hold(NoConfig(), ALONE, seed=None):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold_output_folder(tmp_path):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert "lies on a file system without locks (No locks available)" in line


def test_workers_of_a_killed_holder_keep_nothing(tmp_path):
    ready, go_on = os.pipe(), os.pipe()
    with hold_output_folder(tmp_path):
        pid = os.fork()
        if pid == 0:  # a worker that outlives the lock
            os.write(ready[1], b"x")
            os.read(go_on[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    began_sec = time.monotonic()
    with hold_output_folder(tmp_path):
        assert time.monotonic() - began_sec < 0.2
    os.write(go_on[1], b"x")
    os.waitpid(pid, 0)


def test_a_folder_is_held_by_one_and_waited_for(tmp_path):
    with hold_output_folder(tmp_path), hold_output_folder(tmp_path, hold=False):
        held = threading.Event()

        def wait() -> None:
            with hold_output_folder(tmp_path):
                held.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not held.wait(0.1)
    assert held.wait(5.0)
    waiting.join()
    assert not any(tmp_path.iterdir())


def test_a_folder_whose_holder_was_killed_is_free(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from eqvae.runtime.run_folder import hold_output_folder
with hold_output_folder(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    with hold_output_folder(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "says"),
    [({"command": "evaluate"}, "belongs to 'eqvae evaluate'"), ({"_class_name": "AutoencoderKL"}, "something else")],
)
def test_a_folder_of_another_command_is_refused(tmp_path, content, says):
    write_json(tmp_path / CONFIG, content)
    (tmp_path / "result").touch()
    with pytest.raises(UserError, match=says):
        RunFolder.claim(tmp_path, "finetune")


def test_anything_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no 'eqvae finetune' run"):
        RunFolder.claim(tmp_path, "finetune")
    with pytest.raises(UserError, match="thesis.tex"):
        RunFolder.claim(tmp_path / "thesis.tex", "finetune")
    with pytest.raises(UserError, match="thesis.tex"):
        RunFolder.claim(tmp_path / "thesis.tex" / "run", "finetune")


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path):
    with pytest.raises(UserError, match="--out '/proc/x/y' can't be written: '/proc' takes no files"):
        RunFolder.claim(Path("/proc/x/y"), "finetune")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="is no folder"):
        RunFolder.claim(tmp_path / "nowhere" / "run", "finetune")
    assert RunFolder.claim(tmp_path / "a" / "b" / "c", "finetune").saved is None
    assert [path.name for path in tmp_path.iterdir()] == ["nowhere"]


# Errors -------------------------------------------------------------------------------------------------------------


def test_an_error_is_one_line():
    assert str(UserError("a\nb  c", "Do\n d")) == "a b c. Do d"


def test_the_nearest_name_is_suggested():
    assert nearest_name("tiny-kk", ["tiny-kl", "sd-vae"]) == "Did you mean 'tiny-kl'?"
    assert nearest_name("zzz", ["b", "a"]) == "Known: a, b"
