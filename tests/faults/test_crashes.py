"""Commands that are killed, interrupted, out of space or damaged end, run again, as if nothing had happened."""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent


def _load(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(f"faults_{name}", HERE / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


forks_module, commands_module = _load("forks"), _load("commands")
Ended, Forks, Place, Straight = forks_module.Ended, forks_module.Forks, commands_module.Place, commands_module.Straight
COMMANDS, contents, differences = commands_module.COMMANDS, commands_module.contents, commands_module.differences

NUM_KILLS = int(os.environ.get("EQVAE_KILLS", "50"))
SEED = int(os.environ.get("EQVAE_SEED", "0"))


def both(short: tuple[str, ...], full: tuple[str, ...] | None = None) -> pytest.MarkDecorator:
    """Commands of the short set, which `make test` runs too, and of the full one."""
    full = full or short
    return pytest.mark.parametrize(
        ("command", "extent"),
        [*(pytest.param(command, "short", id=f"short-{command}") for command in short),
         *(pytest.param(command, "full", id=f"full-{command}", marks=pytest.mark.faults) for command in full)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noisy images of 32 px in two class folders."""
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(12):
        path = folder / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Any]:
    """Runs commands in processes that may be killed."""
    made = Forks(tmp_path_factory.mktemp("forks"), images=images)
    yield made
    made.close()


@pytest.fixture(scope="module")
def straight(forks: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Looks up, or makes, the undisturbed run of a command."""
    root = tmp_path_factory.mktemp("straight")
    place = Place(images=images, latents=root / "encode", run=root / "train")
    made: dict[str, Any] = {}
    needs = {"train": ("encode",), "sample": ("encode", "train")}

    def get(command: str) -> Any:
        for need in (*needs.get(command, ()), command):
            if need not in made:
                out = root / need
                fault = {"kind": "count", "below": str(out)}
                ended = forks.run(*place.arguments(need, out), fault=fault)
                assert ended.code == 0, ended.said
                made[need] = Straight(
                    files=contents(out), sec=ended.sec, num_operations=ended.num_operations,
                    arguments=place.arguments(need, Path("OUT")),
                )  # fmt: skip
        return made[command]

    return get


def into(straight_run: Any, out: Path) -> list[str]:
    return [str(out) if argument == "OUT" else argument for argument in straight_run.arguments]


def finish(forks: Any, run: Any, out: Path) -> list[str]:
    """Run a command undisturbed, and name what is not as if it always had been."""
    ended = forks.run(*into(run, out))
    found = differences(out, run) if ended.code == 0 else [f"ends with {ended.code}: {ended.said[-2000:]}"]
    for what in found:
        print(out, what)  # noqa: T201
    return found


def strike(forks: Any, run: Any, out: Path, number: signal.Signals, chance: random.Random) -> tuple[Any, str]:
    """Let a signal reach a command at a random moment, by the clock or just before an operation on a file."""
    if number == signal.SIGKILL and chance.random() < 0.5:
        at = chance.randint(1, run.num_operations)
        fault = {"kind": "kill", "at": at, "below": str(out)}
        return forks.run(*into(run, out), fault=fault), f"operation {at}"
    after_sec = chance.uniform(0.02, run.sec)
    process = forks.start(*into(run, out))
    time.sleep(after_sec)
    os.kill(process, number)
    return forks.wait(process), f"{after_sec:.3f} s"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@both(COMMANDS)
def test_broken_off_at_random_moments(
    forks: Any, straight: Any, tmp_path: Path, counts: dict[str, Any], command: str, number: signal.Signals, extent: str
):
    run, chance = straight(command), random.Random(f"{SEED} {command} {number}")
    wanted = NUM_KILLS if extent == "full" else 2 if number == signal.SIGKILL and command != "reproduce" else 1
    num_strikes, losses = 0, []
    while num_strikes < wanted:
        out, moments = tmp_path / f"out{num_strikes}", []
        while num_strikes < wanted:
            ended, moment = strike(forks, run, out, number, chance)
            moments.append(moment)
            if ended.code == 0:
                break
            num_strikes += 1
            if number == signal.SIGKILL:
                assert ended.code == -signal.SIGKILL, ended.said
            elif ended.code != 130 or len(ended.lines) != 1 or "Traceback" in ended.said:
                losses.append(f"{moments}: SIGTERM ends with {ended.code}: {ended.said[-2000:]}")
        losses += [f"{moments}: {what}" for what in finish(forks, run, out)]
        shutil.rmtree(out, ignore_errors=True)
    counts[number.name] = {command: {"seed": SEED, "strikes": num_strikes, "losses": len(losses)}}
    assert losses == []


@both(("finetune", "encode", "train", "sample"), COMMANDS)
def test_no_space_left(forks: Any, straight: Any, tmp_path: Path, counts: dict[str, Any], command: str, extent: str):
    run, chance = straight(command), random.Random(f"{SEED} {command}")
    moments = list(range(1, run.num_operations + 1))
    if extent == "short":
        moments = chance.sample(moments, 1)
    elif command == "reproduce":
        moments = chance.sample(moments, NUM_KILLS)
    losses, num_full = [], 0
    for at in moments:
        out = tmp_path / f"out{at}"
        ended = forks.run(*into(run, out), fault={"kind": "full", "at": at, "below": str(out)})
        if ended.code != 0:  # else only renaming and removing were left to do
            num_full += 1
            if ended.code != 2 or len(ended.lines) != 1 or "Traceback" in ended.said or "No space" not in ended.said:
                losses.append(f"operation {at} ends with {ended.code}: {ended.said[-2000:]}")
        losses += [f"operation {at}: {what}" for what in finish(forks, run, out)]
        shutil.rmtree(out, ignore_errors=True)
    counts["full_disks"] = {command: {"writes": num_full, "losses": len(losses)}}
    assert losses == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk, or mounts it otherwise."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        kind = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-t", "tmpfs", "-o", options, "none"]
        if os.geteuid() != 0 or subprocess.run(["mount", *kind, str(folder)], capture_output=True).returncode != 0:
            pytest.skip("mounting a small disk is not permitted here")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("command", COMMANDS)
def test_disks_of_every_size(forks: Any, straight: Any, disk: Any, counts: dict[str, Any], command: str):
    run, losses, num_full = straight(command), [], 0
    out = disk("size=1g") / "out"
    assert finish(forks, run, out) == []
    needed_kib = sum(path.stat().st_blocks for path in out.rglob("*")) // 2
    for part in range(1, NUM_KILLS + 1):
        shutil.rmtree(out)
        disk(f"size={4 + needed_kib * part // NUM_KILLS // 4 * 4}k")
        ended = forks.run(*into(run, out))
        if ended.code != 0:
            num_full += 1
            if ended.code != 2 or len(ended.lines) != 1 or "Traceback" in ended.said:
                losses.append(f"part {part} ends with {ended.code}: {ended.said[-2000:]}")
        disk("size=1g")
        losses += [f"part {part}: {what}" for what in finish(forks, run, out)]
    counts["small_disks"] = {command: {"disks": num_full, "losses": len(losses)}}
    assert losses == []


DAMAGED = {
    "finetune": ("checkpoint.safetensors",), "train": ("checkpoint.safetensors",),
    "encode": ("shard-00000.safetensors", "shard-00001.safetensors"), "sample": ("parts/00000000.safetensors",),
    "reproduce": ("checkpoint.safetensors", "shard-00000.safetensors", "00000000.safetensors"),  # of whatever run
}  # fmt: skip


@both(("train", "sample"), tuple(DAMAGED))
def test_damaged_files(forks: Any, straight: Any, tmp_path: Path, counts: dict[str, Any], command: str, extent: str):
    run, chance = straight(command), random.Random(f"{SEED} {command} damage")
    losses, num_damaged, half = [], 0, tmp_path / "half"
    last = run.num_operations - 1  # the figures are not there yet
    if command in ("finetune", "train"):  # in the middle, with two checkpoints
        last = next(
            at for at in range(run.num_operations // 4, run.num_operations, 4) if _is_half(forks, run, half, at)
        )
    elif command == "sample":
        last = next(at for at in range(run.num_operations // 2, 0, -2) if _has_parts(forks, run, half, at))
    elif command == "encode":
        forks.run(*into(run, half), fault={"kind": "kill", "at": last, "below": str(half)})
    for number in range(NUM_KILLS if extent == "full" else 1):
        out = tmp_path / f"out{number}"
        if command == "reproduce":
            path = chance.choice(_half_a_plan(forks, run, out, chance))
        else:
            shutil.copytree(half, out)
            path = out / chance.choice(DAMAGED[command])
        content = bytearray(path.read_bytes())
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(content))]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        num_damaged += 1
        if command == "reproduce" and path.name == "checkpoint.safetensors":
            _remove_if_told(forks, run, out, path)
        losses += [f"damage {number}: {what}" for what in finish(forks, run, out)]
        shutil.rmtree(out, ignore_errors=True)
    counts["damaged_files"] = {command: {"files": num_damaged, "losses": len(losses)}}
    assert losses == []


def _is_half(forks: Any, run: Any, half: Path, at: int) -> bool:
    shutil.rmtree(half, ignore_errors=True)
    forks.run(*into(run, half), fault={"kind": "kill", "at": at, "below": str(half)})
    return (half / "checkpoint.before.safetensors").exists() and (half / "checkpoint.safetensors").exists()


def _has_parts(forks: Any, run: Any, half: Path, at: int) -> bool:
    shutil.rmtree(half, ignore_errors=True)
    forks.run(*into(run, half), fault={"kind": "kill", "at": at, "below": str(half)})
    return (half / DAMAGED["sample"][0]).exists()


def _half_a_plan(forks: Any, run: Any, out: Path, chance: random.Random) -> list[Path]:
    """Kill a plan until one of its runs leaves a file with which it would go on."""
    while True:
        ended, _ = strike(forks, run, out, signal.SIGKILL, chance)
        if ended.code == 0:
            shutil.rmtree(out)
        written = [path for path in sorted(out.rglob("*.safetensors")) if path.name in DAMAGED["reproduce"]]
        unfinished = [path for path in written if not any((folder / "metrics.json").exists() for folder in
                                                          (path.parent, path.parent.parent))]  # fmt: skip
        if unfinished:
            return unfinished


def _remove_if_told(forks: Any, run: Any, out: Path, path: Path) -> None:
    """Before the only checkpoint of a run there is none: a line asks to remove it."""
    ended = forks.run(*into(run, out))
    if ended.code != 0:
        assert (ended.code, len(ended.lines)) == (2, 1), ended.said
        assert str(path) in ended.lines[0] and "Remove the damaged file" in ended.lines[0]
        path.unlink()


@both(("encode",), COMMANDS)
def test_a_folder_that_takes_nothing(forks: Any, straight: Any, disk: Any, command: str, extent: str):
    run = straight(command)
    folder = disk("size=1m")
    disk("ro")
    ended = forks.run(*into(run, folder / "out"))
    assert (ended.code, len(ended.lines)) == (2, 1), ended.said
    assert "can't be written" in ended.lines[0]


@pytest.mark.parametrize("command", ["train", "sample"])
def test_the_clock_is_set_back(forks: Any, straight: Any, tmp_path: Path, command: str):
    run, out = straight(command), tmp_path / "out"
    fault = {"kind": "kill", "at": run.num_operations // 2, "below": str(out)}
    assert forks.run(*into(run, out), fault=fault).code == -signal.SIGKILL
    for path in out.rglob("*"):
        os.utime(path, (4e9, 4e9))
    ended = forks.run(*into(run, out), fault={"kind": "clock"})
    assert ended.code == 0, ended.said
    assert differences(out, run) == []


@pytest.mark.parametrize("command", ["train", "reproduce"])
def test_two_processes_on_one_folder(forks: Any, straight: Any, tmp_path: Path, command: str):
    run, out = straight(command), tmp_path / "out"
    processes = [forks.start(*into(run, out)) for _ in range(2)]
    ended = [forks.wait(process) for process in processes]
    for each in ended:
        assert each.code == 0 or (each.code, len(each.lines)) == (2, 1), each.said
        assert "Traceback" not in each.said
    assert 0 in [each.code for each in ended]
    assert finish(forks, run, out) == []


def _begun(out: Path) -> list[Path]:
    """The folders of runs that have begun, while things come and go."""
    return sorted(Path(folder) for folder, _, files in os.walk(out) if "environment.json" in files)


@both(("finetune", "encode"), COMMANDS)
def test_the_folder_is_removed(
    forks: Any, straight: Any, tmp_path: Path, counts: dict[str, Any], command: str, extent: str
):
    run, chance, losses = straight(command), random.Random(f"{SEED} {command} removed"), []
    for number in range(NUM_KILLS if extent == "full" else 1):
        out = tmp_path / f"out{number}"
        process = forks.start(*into(run, out))
        deadline_sec, after_sec = time.monotonic() + 60, chance.uniform(0, 0.7 * run.sec)
        while not _begun(out) and time.monotonic() < deadline_sec:
            time.sleep(0.01)
        time.sleep(after_sec)
        removed = out
        if command == "reproduce":  # all of it, or one of its runs
            removed = chance.choice([out, *_begun(out)])
        if removed.exists():
            removed.rename(tmp_path / "elsewhere")
            shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        ended = forks.wait(process)
        if ended.code != 0 and ((ended.code, len(ended.lines)) != (2, 1) or "Traceback" in ended.said):
            losses.append(f"{after_sec:.3f} s: ends with {ended.code}: {ended.said[-2000:]}")
        losses += [f"{after_sec:.3f} s: {what}" for what in finish(forks, run, out)]
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    counts["removed_folders"] = {command: {"folders": number + 1, "losses": len(losses)}}
    assert losses == []
