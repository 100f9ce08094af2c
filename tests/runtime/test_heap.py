"""What a processor's heap keeps of what was given back, against what can be worked out by hand."""

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
