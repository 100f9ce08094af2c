"""What a processor's heap keeps of what was given back, against what can be worked out by hand."""

import platform
import subprocess
import sys

import pytest

from eqvae.runtime.heap import Heap

KIB, PAGE, MIB = 2**10, 2**12, 2**20


@pytest.fixture
def heap() -> Heap:
    """One whose blocks below 32 MiB lie on the heap."""
    heap = Heap()
    heap.give_back(heap.take(32 * MIB - PAGE))
    assert heap.taken_bytes == 0
    return heap


def test_large_blocks_go_back_at_once_and_move_the_threshold():
    heap = Heap()
    first, second = heap.take(MIB), heap.take(64 * MIB)
    assert heap.taken_bytes == 65 * MIB + 2 * PAGE
    heap.give_back(second)  # too large to move it
    assert (heap.taken_bytes, heap.threshold) == (MIB + PAGE, 128 * KIB)
    heap.give_back(first)
    assert (heap.taken_bytes, heap.threshold) == (0, MIB + PAGE)
    assert heap.take(MIB).start == 0  # on the heap, from now on


def test_a_hole_stays_and_is_filled_by_what_fits_best(heap: Heap):
    blocks = [heap.take(size * MIB) for size in (8, 1, 4, 1)]
    heap.give_back(blocks[0])
    heap.give_back(blocks[2])
    assert heap.taken_bytes == 14 * MIB
    assert heap.take(3 * MIB).start == 9 * MIB  # in the smaller hole
    assert heap.take(8 * MIB).start == 14 * MIB  # malloc looks for a little more than a block takes
    assert heap.take(8 * MIB - KIB).start == 0
    assert heap.taken_bytes == 22 * MIB
    heap.take(2 * MIB)  # only 1 MiB is left
    assert heap.taken_bytes == 24 * MIB


def test_holes_side_by_side_become_one(heap: Heap):
    blocks = [heap.take(MIB) for _ in range(4)]
    for block in (blocks[0], blocks[2], blocks[1]):
        heap.give_back(block)
    assert heap.take(3 * MIB - KIB).start == 0
    assert heap.taken_bytes == 4 * MIB


def test_a_free_end_is_used_again(heap: Heap):
    blocks = [heap.take(30 * MIB) for _ in range(3)]
    for block in (blocks[2], blocks[0], blocks[1]):
        heap.give_back(block)
    assert heap.take(31 * MIB).start == 0
    assert heap.taken_bytes == 90 * MIB


def test_a_fixed_threshold_does_not_move():
    heap = Heap.giving_back_at_once()
    heap.give_back(heap.take(4 * MIB))
    first, _, third = (heap.take(size) for size in (MIB, 64 * KIB, MIB))
    heap.give_back(first)
    heap.give_back(third)
    assert heap.taken_bytes == 64 * KIB


HELD = """
import ctypes, psutil
from eqvae.runtime.heap import give_back_at_once
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if {fixed}:
    give_back_at_once()
free(malloc(30 << 20))  # moves a threshold that can move
before = psutil.Process().memory_info().rss
places = [(malloc(1 << 20), malloc(60_000)) for _ in range(100)]
for large, small in places:
    ctypes.memset(large, 1, 1 << 20)
for large, small in places:
    free(large)
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is another one")
@pytest.mark.parametrize(("fixed", "held_mib"), [(False, 100), (True, 0)])
def test_malloc_does_as_is_simulated(fixed: bool, held_mib: int):
    script = HELD.format(fixed=fixed)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ended.stdout) == pytest.approx(held_mib, abs=8)
