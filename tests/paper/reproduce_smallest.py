"""A process of its own that reproduces items at the smallest scale: `reproduce_smallest.py IMAGES ROOT ITEM ...`."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SPECIFICATION = importlib.util.spec_from_file_location("smallest_scale", Path(__file__).with_name("conftest.py"))
assert SPECIFICATION is not None and SPECIFICATION.loader is not None
shared = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(shared)


if __name__ == "__main__":
    from eqvae.cli import run
    from eqvae.paper import execution
    from eqvae.paper.settings import SETTINGS

    torch.set_num_threads(1)
    monkeypatch = pytest.MonkeyPatch()
    shared.measure_at_once(monkeypatch)
    shared.narrow_generators(monkeypatch)
    monkeypatch.setattr("eqvae.paper.execution._POLL_SEC", 0.1)
    perform = execution.perform

    def counted(planned):
        """Perform, and say so where all processes can be counted together."""
        with Path(os.environ["EQVAE_TEST_COUNT"]).open("a") as file:
            file.write(f"{os.getpid()} {planned.name}\n")
        perform(planned)

    execution.perform = counted
    images, root, *items = sys.argv[1:]
    SETTINGS["tiny"] = replace(shared.smallest(Path(images)), seeds=(0,), strengths=(0.3, 0.5))
    sys.exit(run(["reproduce", *items, "--out", root, "--device", "cpu", "--scale", "tiny"]))
