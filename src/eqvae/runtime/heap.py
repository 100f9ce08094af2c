"""What a processor's heap takes of the system, which is more than what is alive: holes between blocks stay with it.

As glibc's malloc does it with large blocks: a block of `mmap_threshold` or more is the system's own and goes back at
once; smaller ones lie on one heap, which could be given back from its end, but for something small of Python's there.
The threshold grows, up to 32 MiB, to the largest block of its own that was given back, unless it is fixed.
"""

import contextlib
import ctypes
from dataclasses import dataclass, field

_PAGE, _UNIT = 4096, 64
_SPARE = 2 * _UNIT
"""What malloc looks for beyond a block, so that its begin can be aligned: a block's own hole is too small for it."""

_FIRST_THRESHOLD, _LARGEST_THRESHOLD = 2**17, 2**25

_FIXED_THRESHOLD = 2**18
_MMAP_THRESHOLD = -3
"""malloc.h's M_MMAP_THRESHOLD."""


def give_back_at_once() -> None:
    """Fix the threshold low for the rest of this process, if malloc is glibc's: no holes, but fresh pages cost time."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _FIXED_THRESHOLD)


@dataclass(frozen=True)
class Block:
    """A place that was taken."""

    start: int | None
    """On the heap; None for a block of its own."""

    size: int


@dataclass
class Heap:
    """Follows what is taken and given back."""

    mapped_bytes: int = 0
    """Of blocks of their own."""

    end: int = 0
    """Of the heap."""

    threshold: int = _FIRST_THRESHOLD

    is_fixed: bool = False

    _top: int = 0
    """Beyond it the heap is free."""

    _holes: dict[int, int] = field(default_factory=dict)
    """Sizes of free places below the top, by where they begin."""

    _ends: dict[int, int] = field(default_factory=dict)
    """Where the hole begins that ends somewhere."""

    @classmethod
    def giving_back_at_once(cls) -> "Heap":
        """Make the heap of a process that called `give_back_at_once`."""
        return cls(threshold=_FIXED_THRESHOLD, is_fixed=True)

    @property
    def taken_bytes(self) -> int:
        """All that the system has given."""
        return self.mapped_bytes + self.end

    def take(self, num_bytes: int) -> Block:
        """Take the smallest hole that is large enough, or the heap's top."""
        if num_bytes >= self.threshold:
            block = Block(None, (num_bytes // _PAGE + 1) * _PAGE)  # with its header
            self.mapped_bytes += block.size
            return block
        size = max(-(-num_bytes // _UNIT), 1) * _UNIT
        large_enough = [(length, start) for start, length in self._holes.items() if length >= size + _SPARE]
        if large_enough:
            length, start = min(large_enough)
            self._close(start)
            if length > size:
                self._open(start + size, length - size)
        else:
            start, self._top = self._top, self._top + size
            self.end = max(self.end, self._top)
        return Block(start, size)

    def give_back(self, block: Block) -> None:
        """Give a block back: a hole joins its neighbours."""
        if block.start is None:
            self.mapped_bytes -= block.size
            if block.size <= _LARGEST_THRESHOLD and not self.is_fixed:
                self.threshold = max(self.threshold, block.size)
            return
        start, size = block.start, block.size
        if start in self._ends:
            start = self._ends[start]
            size += self._close(start)
        if start + size in self._holes:
            size += self._close(start + size)
        if start + size < self._top:
            self._open(start, size)
            return
        self._top = start

    def _open(self, start: int, size: int) -> None:
        self._holes[start] = size
        self._ends[start + size] = start

    def _close(self, start: int) -> int:
        size = self._holes.pop(start)
        del self._ends[start + size]
        return size
