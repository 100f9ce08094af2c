"""Commands in forked processes: one process imports everything once, and its children can be killed.

`forks.py` itself is that process: it reads lines of JSON and answers each with one. A child may carry a fault that
strikes at its n-th operation on files below a folder:

- `kill`: SIGKILL to itself, just before the operation;
- `full`: from there on, no file can be begun or made longer (ENOSPC);
- `count`: nothing happens, but the number of operations is said in the end;
- `clock`: the clock stands in 1970.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link")
_WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Negative: the signal that killed it."""

    said: str
    """Standard output and error."""

    sec: float

    num_operations: int
    """On files below the folder of its fault."""

    @property
    def lines(self) -> list[str]:
        """What the command itself said of its end."""
        return [line for line in self.said.splitlines() if line.startswith("eqvae:")]


class Forks:
    """The process that imports everything once."""

    def __init__(self, folder: Path, *, images: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._errors = (folder / "errors").open("w")
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(images)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def start(self, *arguments: str, fault: dict[str, Any] | None = None) -> int:
        """Start a command; returns its process."""
        return self._ask(do="start", arguments=list(arguments), folder=str(self._folder), fault=fault or {})

    def wait(self, process: int) -> Ended:
        """Wait for a command's end."""
        code, sec = self._ask(do="wait", process=process)
        said, counted = (self._folder / f"{process}.{kind}" for kind in ("said", "count"))
        count, modules = json.loads(counted.read_text()) if counted.exists() else (0, [])
        ended = Ended(code, said.read_text(), sec, count)
        if modules:
            self._ask(do="import", modules=modules)  # what one child had to import, no other one has to
        for path in (said, counted):
            path.unlink(missing_ok=True)
        return ended

    def run(self, *arguments: str, fault: dict[str, Any] | None = None) -> Ended:
        """Run a command to its end."""
        return self.wait(self.start(*arguments, fault=fault))

    def close(self) -> None:
        """End the process."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
        self._errors.close()

    def _ask(self, **question: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, (self._folder / "errors").read_text()
        return json.loads(answer)


def _serve(images: Path) -> None:
    run = _import_all(images)
    known = set(sys.modules)
    began: dict[int, float] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "wait":
            _, status = os.waitpid(asked["process"], 0)
            answer: Any = [os.waitstatus_to_exitcode(status), time.monotonic() - began.pop(asked["process"])]
        elif asked["do"] == "import":
            for name in asked["modules"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            answer = None
        else:
            answer = os.fork()
            if answer == 0:
                _run_child(run, Path(asked["folder"]), asked["arguments"], asked["fault"], known)
            began[answer] = time.monotonic()
        print(json.dumps(answer), flush=True)  # noqa: T201
    os._exit(0)


def _import_all(images: Path) -> Any:
    """Import all that the commands need, at the smallest scale."""
    from dataclasses import replace

    import pytest
    import torch

    specification = importlib.util.spec_from_file_location(
        "smallest_scale", Path(__file__).parents[1] / "paper" / "conftest.py"
    )
    assert specification is not None and specification.loader is not None
    shared = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(shared)
    for name in ("finetune_run", "encode_run", "train", "sample", "reproduce"):
        importlib.import_module(f"eqvae.runs.{name}")
    from eqvae.cli import run
    from eqvae.paper.settings import SETTINGS

    torch.set_num_threads(1)
    monkeypatch = pytest.MonkeyPatch()
    shared.measure_at_once(monkeypatch)
    shared.narrow_generators(monkeypatch)
    monkeypatch.setattr("eqvae.paper.execution._POLL_SEC", 0.1)
    monkeypatch.setattr("eqvae.runs.sample.IMAGES_PER_PART", 3)
    SETTINGS["tiny"] = replace(shared.smallest(images), seeds=(0,), strengths=(0.5,))
    return run


def _run_child(run: Any, folder: Path, arguments: list[str], fault: dict[str, Any], known: set[str]) -> None:
    import atexit

    said = os.open(folder / f"{os.getpid()}.said", os.O_WRONLY | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, said), (2, said)):
        os.dup2(source, target)
    atexit._clear()
    counted = _install(fault)
    code = 1
    try:
        code = run(arguments)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the command line does
    except BaseException:
        import traceback

        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    counting, counted[0] = counted[0], -(10**9)
    (folder / f"{os.getpid()}.count").write_text(
        json.dumps([counting, [name for name in sys.modules if name not in known and fault.get("kind") == "count"]])
    )
    os._exit(code)


def _install(fault: dict[str, Any]) -> list[int]:
    """Let a fault strike; returns a list whose only number counts operations."""
    import errno

    counted = [0]
    if fault.get("kind") == "clock":
        time.time = lambda: 1000.0
    if "below" not in fault:
        return counted

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or not str(arguments[0]).startswith(fault["below"]):
            return
        is_writing = event == "open" and bool((arguments[2] or 0) & _WRITING)
        if event == "open" and not is_writing:
            return
        counted[0] += 1
        if counted[0] < fault.get("at", 0):
            return
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault["kind"] == "full" and (is_writing or event in ("os.mkdir", "os.link")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hear)
    return counted


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
