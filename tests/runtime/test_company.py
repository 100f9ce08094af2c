"""Processes that see one another end: those that are done may go, any other one takes the rest along."""

import os
import signal
import socket
import time

import pytest

from eqvae.runtime import company
from eqvae.runtime.company import Company


def start(rank: int, connections: list[socket.socket], others: list[socket.socket], does: str) -> int:
    """Fork a process that waits for ever, or is done, or ends badly; returns its number."""
    child = os.fork()
    if child == 0:
        for connection in others:
            connection.close()
        own = Company(rank, connections)
        if does != "waits":
            time.sleep(0.1)
            own.leave(is_done=does == "is done")
            os._exit(0)
        time.sleep(20)
        os._exit(1)
    return child


def run(*does: str, killed: int | None = None) -> list[int]:
    """Let processes do something, the first one connected to each other; returns how they end."""
    pairs = [socket.socketpair() for _ in does[1:]]
    sockets = [[one for one, _ in pairs], *([other] for _, other in pairs)]
    children = []
    for rank, what in enumerate(does):
        others = [each for number, own in enumerate(sockets) if number != rank for each in own]
        children.append(start(rank, sockets[rank], others, what))
    for own in sockets:
        for each in own:
            each.close()
    if killed is not None:
        os.kill(children[killed], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(company, "_GRACE_SEC", 0.1)
    monkeypatch.setattr(company, "_PATIENCE_SEC", 0.1)


LINE = "eqvae: interrupted, another process ended; run the same command again\n"


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_one_that_is_killed_ends_all_in_one_line(killed: int, capfd: pytest.CaptureFixture[str]):
    codes = run("waits", "waits", "waits", killed=killed)
    assert codes == [-signal.SIGKILL if rank == killed else 130 for rank in range(3)]
    assert capfd.readouterr().err == LINE


def test_one_that_ends_badly_ends_all(capfd: pytest.CaptureFixture[str]):
    assert run("waits", "ends badly", "waits") == [130, 0, 130]
    assert capfd.readouterr().err == LINE


def test_one_that_is_done_leaves_the_others(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(time, "sleep", lambda sec, sleep=time.sleep: sleep(min(sec, 0.5)))
    assert run("waits", "is done", "is done") == [1, 0, 0]
    assert capfd.readouterr().err == ""


def test_one_process_keeps_no_company():
    company.keep_company(0, 1)
    assert company._company is None
    assert company.is_to_speak()
