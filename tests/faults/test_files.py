"""Files survive what happens to the process that writes them: a kill, a full disk, a damaged disk."""

import errno
from pathlib import Path
from typing import Any

import pytest

from eqvae.artifacts.files import write_atomically


@pytest.mark.faults
def test_a_write_that_fails_at_any_byte_leaves_the_former_file(tmp_path: Path, counts: dict[str, Any]):
    path = tmp_path / "file"
    path.write_bytes(b"former")
    for length in range(100):

        def write(temporary: Path, length: int = length) -> None:
            temporary.write_bytes(bytes(length))
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError):
            write_atomically(path, write)
        assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"former")]
    counts["failed_writes"] = {"file": {"writes": 100}}
