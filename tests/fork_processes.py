"""Does commands on several processes that are forked from this one, so that imports are paid once.

Each line of the input is an order: `count`, the `arguments` of eqvae, the file `said` for what they print, `stop_at`, a
step after which the first process gets a SIGTERM, `ends_all`, whether all get one where one ends badly, as torchrun has
it. Two lines answer it: their numbers, and their exit codes.
"""

import atexit
import importlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import torch

from eqvae.cli import COMMANDS, run
from eqvae.training.loop import Loop


def stop_at(step: int) -> None:
    """Have this process get a SIGTERM after a training step."""
    take_step = Loop._step

    def stopped(loop: Loop, batch: Any) -> Any:
        figures = take_step(loop, batch)
        if loop.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return figures

    Loop._step = stopped


def work(order: dict[str, Any], rank: int, port: int) -> int:
    """Be one of the processes."""
    count = str(order["count"])
    if order["count"] > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (0, 1, 2):
        os.dup2(said if stream else os.open(os.devnull, os.O_RDONLY), stream)
    if order["stop_at"] is not None and rank == 0:
        stop_at(order["stop_at"])
    try:
        return run(order["arguments"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()


def main() -> None:
    torch.set_num_threads(1)
    for command in COMMANDS:
        importlib.import_module(f"eqvae.runs.{command}")
    assert threading.active_count() == 1
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        numbers = []
        for rank in range(order["count"]):
            number = os.fork()
            if number == 0:
                os._exit(work(order, rank, port))
            numbers.append(number)
        print(json.dumps(numbers), flush=True)  # noqa: T201
        codes = dict.fromkeys(numbers)
        for _ in numbers:
            ended, status = os.waitpid(-1, 0)
            codes[ended] = os.waitstatus_to_exitcode(status)
            if order["ends_all"] and codes[ended] != 0:
                for number in numbers:
                    if codes[number] is None:
                        os.kill(number, signal.SIGTERM)
        print(json.dumps(list(codes.values())), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
