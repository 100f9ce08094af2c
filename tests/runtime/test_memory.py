"""What work takes, worked out on tensors without values, against what can be counted by hand; what does not fit."""

import errno

import psutil
import pytest
import torch
from torch import nn

from eqvae.errors import UserError
from eqvae.runtime import memory
from eqvae.runtime.memory import Memory, free_bytes, measure, told_when_full, without_values

CPU = torch.device("cpu")
MIB = 2**20


def test_what_is_alive_at_the_same_time_counts():
    kept = []

    def one_after_another() -> None:
        for _ in range(3):
            torch.empty(MIB, dtype=torch.uint8)

    def together() -> None:
        kept.extend(torch.zeros(MIB, dtype=torch.uint8) for _ in range(3))
        kept[0].view(-1)[: MIB // 2].add_(1)  # a view and an operation in place take nothing

    phases = measure(CPU, apart=one_after_another, together=together, after=lambda: None).phases
    assert phases == pytest.approx({"apart": MIB, "together": 3 * MIB, "after": 3 * MIB}, rel=0.01)


def test_a_training_step_by_hand():
    num_weights = 2**18
    layer = nn.Linear(512, 512, bias=False)

    def step() -> None:
        own = without_values(layer, CPU)
        optimizer = torch.optim.AdamW(own.parameters(), fused=True)
        for _ in range(2):
            loss = own(torch.randn(1, 512)).sum()
            assert bool(torch.isfinite(loss))  # it has no value, and is taken for good
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    phases = measure(CPU, step=step).phases
    assert phases["step"] == pytest.approx(4 * 4 * num_weights, rel=0.02)  # weights, gradients, two moments


def test_what_is_loaded_counts_once():
    layer = nn.Linear(2048, 2048, bias=False)
    alone, loaded = (measure(CPU, *modules, state=lambda: without_values(layer, CPU)) for modules in ((), (layer,)))
    assert alone.process_bytes - loaded.process_bytes == pytest.approx(16 * MIB, abs=MIB)


def test_tensors_elsewhere_take_nothing_of_the_device():
    assert measure(torch.device("meta"), elsewhere=lambda: torch.zeros(MIB)).phases == {"elsewhere": 0}


def test_what_hangs_on_values_is_no_reason_not_to_run():
    def work() -> None:
        torch.empty(MIB, dtype=torch.uint8)
        torch.rand(8).nonzero()

    found = measure(CPU, work=work)
    assert found.unknown == ("work",)
    assert found.figures()["memory_unknown"] == ["work"]
    assert found.phases["work"] >= MIB


def test_a_run_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * 2**30)
    needs = Memory(phases={"state": 2**30, "step": 7 * 2**30}, process_bytes=2**29)
    needs.check_fits(CPU, ("--batch-size",))
    assert capsys.readouterr().err == ""
    Memory(phases={"step": 10 * 2**30}, process_bytes=0).check_fits(CPU, ("--batch-size",))
    assert (
        "this may not fit: its step will take about 10.0 GiB of memory, and 10.0 GiB are free"
        in capsys.readouterr().err
    )
    line = "its step will take about 7.5 GiB of memory, and 5.0 GiB are free. These help: --batch-size, --shard$"
    with pytest.raises(UserError, match=line):
        needs.check_fits(CPU, ("--batch-size", "--shard"), num_processes=2)


def test_a_device_that_is_full():
    with (
        pytest.raises(UserError, match="memory is full .CUDA out of memory.. These help: --batch-size"),
        told_when_full(("--batch-size",)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    ],
)
def test_a_machine_that_is_full(error: Exception):
    with (
        pytest.raises(UserError, match="the machine's memory is full.*These help: --batch-size"),
        told_when_full(("--batch-size",)),
    ):
        raise error


def test_other_errors_are_what_they_are():
    for error in (RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(type(error)), told_when_full(("--batch-size",)):
            raise error


def test_this_machine_has_memory():
    assert 2**26 < free_bytes(CPU) < 2**46


def test_what_a_container_keeps_of_files_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr("eqvae.runtime.memory._GROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{2**27}\n")
    (tmp_path / "memory.current").write_text(f"{2**27 - 2**10}\n")
    (tmp_path / "memory.stat").write_text(f"anon 123\nactive_file {2**25}\ninactive_file {2**24}\n")
    own = psutil.Process().memory_info().rss
    assert free_bytes(CPU) == pytest.approx(2**10 + 2**25 + 2**24 + own, rel=0.1)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2**28
