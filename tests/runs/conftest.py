"""What the tests of several processes share: these are forked from one process, which has paid for the imports."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLOCKS = ("images_per_sec", "training_sec", "share_of_peak", "kind")


@dataclass(frozen=True)
class Outcome:
    """How a command ended on several processes."""

    codes: list[int]
    said: str

    @property
    def lines(self) -> list[str]:
        """What eqvae says to the user."""
        return [line for line in self.said.splitlines() if line.startswith("eqvae: ")]


class Job:
    """A command under way on several processes."""

    def __init__(self, forks: "Forks", said: Path) -> None:
        self.numbers: list[int] = json.loads(forks.read())
        self._forks, self._said = forks, said

    @property
    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""

    def end(self) -> Outcome:
        """Wait for all of its processes."""
        codes = json.loads(self._forks.read())
        return Outcome(codes, self.said)


class Forks:
    """Starts commands on several processes, as a scheduler does: nobody ends one of them for another, unless asked."""

    def __init__(self, folder: Path) -> None:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "fork_processes.py")], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=variables | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self._folder, self._count = folder, 0

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return line

    def start(
        self, count: int, arguments: Sequence[object], *, stop_at: int | None = None, ends_all: bool = False
    ) -> Job:
        """Start a command; the first of its processes gets a SIGTERM after the step `stop_at`."""
        self._count += 1
        said = self._folder / f"said-{self._count}"
        words = [str(each) for each in arguments]
        order = {"count": count, "arguments": words, "said": str(said), "stop_at": stop_at, "ends_all": ends_all}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Job(self, said)

    def run(self, count: int, arguments: Sequence[object], *, stop_at: int | None = None) -> Outcome:
        """Do a command to its end, which has to be a good one unless it was to stop."""
        outcome = self.start(count, arguments, stop_at=stop_at).end()
        assert outcome.codes == [0 if stop_at is None else 130] * count, outcome.said
        return outcome

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def eight_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight noisy images of 64 px in two class folders."""
    folder, random = tmp_path_factory.mktemp("images") / "data", np.random.default_rng(0)
    for index in range(8):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder
