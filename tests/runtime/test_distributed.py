"""Alone and as two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eqvae.runtime.processes import Processes, join_processes

PROGRAM = """
import atexit
import sys
from pathlib import Path

import torch
from eqvae.runtime.processes import join_processes


def report():
    if not torch.distributed.is_initialized():
        with Path(sys.argv[1], str(processes.rank)).open("a") as file:
            file.write(", left")


atexit.register(report)
processes = join_processes(torch.device("cpu"))
assert join_processes(torch.device("cpu")) == processes
own = torch.full((2,), processes.rank + 1.0)
assert processes.sum(own).tolist() == [3.0, 3.0]
assert own.tolist() == [processes.rank + 1.0] * 2
assert processes.gather({"rank": processes.rank}) == [{"rank": 0}, {"rank": 1}]
with processes.progress("work", total=1) as progress:
    assert (progress is None) == (processes.rank == 1)
    if progress is not None:
        progress.advance(1)
processes.wait()
Path(sys.argv[1], str(processes.rank)).write_text(f"of {processes.count}, first: {processes.is_first}")
"""


def test_alone(capsys):
    processes = join_processes(torch.device("cpu"))
    assert processes == Processes(rank=0, count=1, device=torch.device("cpu"))
    assert processes.is_first
    processes.wait()
    value = torch.ones(3)
    assert processes.sum(value) is value
    assert processes.gather("x") == ["x"]
    with processes.progress("work", total=2, unit="image") as progress:
        assert progress is not None
        progress.advance(2)
    assert "work: 2/2 images" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, tmp_path / "program.py", tmp_path], capture_output=True, text=True, timeout=180, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0").read_text() == "of 2, first: True, left"
    assert (tmp_path / "1").read_text() == "of 2, first: False, left"
    assert done.stderr.count("work: 1/1 steps") == 1
