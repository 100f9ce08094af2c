"""Runs damaged input in a forked child that may not crash, hang, grow, write elsewhere, start or call anything."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hypothesis.configuration import set_hypothesis_home_dir

MAX_BYTES = 2**30
"""Beyond what the process has already."""

MAX_SEC = 20
"""For one input."""

_FORBIDDEN = (
    "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "pickle.find_class", "shutil.rmtree", "os.remove", "os.rename", "os.symlink", "os.link", "os.chmod",
)  # fmt: skip


def in_fence(work: Callable[[Callable[[bytes], None]], None], folder: Path, *, max_sec: int = MAX_SEC) -> None:
    """Call `work` in a child; it says each input to the function that it is given, before it reads it."""
    folder.mkdir(exist_ok=True)
    report, last = folder / "report.txt", folder / "last.bin"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _close_fence(folder)

            def begin(content: bytes) -> None:
                last.write_bytes(content)
                signal.alarm(max_sec)  # whose signal ends the child

            work(begin)
            status = 0
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    told = report.read_text() if report.exists() else ""
    assert code == 0, f"the child ended with {code}; its last input is in '{last}'\n{told[-4000:]}"


def _close_fence(folder: Path) -> None:
    sys.dont_write_bytecode = True
    set_hypothesis_home_dir(folder)
    # Kilobytes of virtual memory, of which a process that has imported PyTorch holds several gigabytes.
    in_use = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                  if line.startswith("VmSize"))  # fmt: skip
    resource.setrlimit(resource.RLIMIT_AS, (in_use * 1024 + MAX_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event in _FORBIDDEN and not _is_ours(arguments, folder):
            (folder / "report.txt").write_text(f"{event} {arguments}\n{''.join(traceback.format_stack())}")
            os._exit(99)
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
            if path and not path.startswith((str(folder), "/dev/")):
                (folder / "report.txt").write_text(f"wrote to {path}\n{''.join(traceback.format_stack())}")
                os._exit(98)

    sys.addaudithook(look)


def _is_ours(arguments: tuple[object, ...], folder: Path) -> bool:
    return bool(arguments) and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(str(folder))
