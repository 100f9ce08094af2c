"""Whether the other processes of a run are still there: each keeps a connection to the first one, which ends with it.

A collective fails when a process is lost, where one is under way and its library notices. Between collectives, and in
those that don't notice, a thread sees it here: it leaves the run some seconds to end by itself, and then ends it, as a
kill would, after which the same command goes on.
"""

import atexit
import contextlib
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence

_GRACE_SEC = 6.0
_CONNECT_SEC = 10.0
_PATIENCE_SEC = 1.0
_DONE, _OTHER_LOST = b"d", b"o"

_company: "Company | None" = None


class Company:
    """This process's connections to the others."""

    def __init__(self, rank: int, connections: Sequence[socket.socket]) -> None:
        """Begin to listen."""
        self._rank, self._connections, self._is_over = rank, list(connections), False
        self._first_is_lost = threading.Event()
        threading.Thread(target=self._listen, name="company", daemon=True).start()

    def leave(self, *, is_done: bool) -> None:
        """End listening; a process that is done may leave before the others, any other one takes them along."""
        self._is_over = True
        for connection in self._connections:
            self._tell(connection, _DONE if is_done else b"")

    def _tell(self, connection: socket.socket, what: bytes) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(what)
            connection.shutdown(socket.SHUT_RDWR)  # a forked worker may hold it open

    def _listen(self) -> None:
        there = list(self._connections)
        while there:
            for connection in select.select(there, [], [])[0]:
                try:
                    said = connection.recv(1)
                except OSError:
                    said = b""
                if said != _DONE:
                    if self._rank > 0 and said != _OTHER_LOST:
                        self._first_is_lost.set()
                    self._end()
                    return
                there.remove(connection)

    def is_to_speak(self) -> bool:
        """Whether this process is the one that says it: the first, or where that is the lost one, the second."""
        return self._rank == 0 or (self._rank == 1 and self._first_is_lost.wait(_PATIENCE_SEC))

    def _end(self) -> None:
        if self._is_over:
            return
        for connection in self._connections if self._rank == 0 else ():
            self._tell(connection, _OTHER_LOST)
        time.sleep(_GRACE_SEC)
        if self._is_over:
            return
        if self.is_to_speak():
            line = "eqvae: interrupted, another process ended; run the same command again"
            print(line, file=sys.stderr, flush=True)  # noqa: T201
        os._exit(130)


def keep_company(rank: int, count: int) -> None:
    """Connect to the other processes, once; without connections nothing is noticed but by collectives."""
    global _company
    if _company is not None or count == 1:
        return
    with contextlib.suppress(OSError):
        _company = Company(rank, _accept(count) if rank == 0 else _connect())
        atexit.register(leave_company, is_done=True)


def leave_company(*, is_done: bool) -> None:
    """Say that this process has ended; further commands of the same process are no longer watched."""
    if _company is not None:
        _company.leave(is_done=is_done)


def is_to_speak() -> bool:
    """Whether this process says that another one is lost."""
    return _company is None or _company.is_to_speak()


def _accept(count: int) -> list[socket.socket]:
    word = secrets.token_bytes(16)
    try:
        server = _serve()
    except OSError:
        _told(None)
        raise
    with server:
        _told((server.getsockname()[1], word))
        found: list[socket.socket] = []
        until_sec = time.monotonic() + _CONNECT_SEC
        while len(found) < count - 1 and (left_sec := until_sec - time.monotonic()) > 0:
            server.settimeout(left_sec)
            with contextlib.suppress(TimeoutError):
                connection = server.accept()[0]
                connection.settimeout(left_sec)
                if _read(connection, len(word)) == word:
                    connection.settimeout(None)
                    found.append(connection)
                else:
                    connection.close()
        return found


def _serve() -> socket.socket:
    is_dual = socket.has_dualstack_ipv6()
    family, host = (socket.AF_INET6, "::") if is_dual else (socket.AF_INET, "0.0.0.0")
    return socket.create_server((host, 0), family=family, dualstack_ipv6=is_dual)


def _connect() -> list[socket.socket]:
    said = _told(None)
    if said is None:
        return []
    port, word = said
    connection = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), timeout=_CONNECT_SEC)
    connection.sendall(word)
    connection.settimeout(None)
    return [connection]


def _told(what: tuple[int, bytes] | None) -> tuple[int, bytes] | None:
    """Tell all processes what the first one says."""
    from torch.distributed import broadcast_object_list  # the command line knows this file before PyTorch

    said = [what]
    broadcast_object_list(said, src=0)
    return said[0]


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes and (more := connection.recv(num_bytes - len(found))):
        found += more
    return found
