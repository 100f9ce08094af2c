"""Batches follow (seed, step) alone, and broken images are replaced up to the limit."""

import gc
import multiprocessing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eqvae.errors import UserError
from eqvae.images import ImageBatch, ImageSource, adm_crop, evaluation_batches, open_images, to_images, training_batches


def write_images(folder: Path, num_images: int, broken: tuple[int, ...] = ()) -> ImageSource:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(num_images):
        path = folder / f"{index:04}.png"
        if index in broken:
            path.write_bytes(b"broken")
        else:
            height, width = random.integers(9, 20, 2)
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return open_images(str(folder))


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    return write_images(tmp_path, 10)


def train(source: ImageSource, num_steps: int = 8, **options: int) -> list[ImageBatch]:
    settings = {"image_size_px": 8, "batch_size": 4, "seed": 1, "num_workers": 0} | options
    return list(training_batches(source, num_steps=num_steps, **settings))


def evaluate(source: ImageSource, num_images: int | None = None, **options: int) -> list[ImageBatch]:
    settings = {"image_size_px": 8, "batch_size": 4, "num_workers": 0} | options
    return list(evaluation_batches(source, num_images=num_images, **settings))


def assert_same(first: list[ImageBatch], second: list[ImageBatch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert (one.indices, one.broken) == (other.indices, other.broken)


def test_training_batches_cover_every_epoch(source: ImageSource) -> None:
    batches = train(source, num_steps=10)
    assert all(batch.images.shape == (4, 3, 8, 8) and len(batch.indices) == 4 for batch in batches)
    assert all(batch.images.min() >= -1 and batch.images.max() <= 1 for batch in batches)
    visited = [index for batch in batches for index in batch.indices]
    epochs = [tuple(visited[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4  # another order each time


def test_batches_larger_than_the_source(source: ImageSource) -> None:
    (batch,) = train(source, num_steps=1, batch_size=25)
    assert sorted(batch.indices[:10]) == sorted(batch.indices[10:20]) == list(range(10))
    assert batch.images.shape[0] == 25


def test_same_image_is_cropped_anew_each_time(tmp_path: Path) -> None:
    (batch,) = train(write_images(tmp_path, 1), num_steps=1)
    assert batch.indices == (0, 0, 0, 0)
    assert len({image.numpy().tobytes() for image in batch.images}) == 4


def test_seed(source: ImageSource) -> None:
    assert_same(train(source), train(source))
    assert train(source)[0].indices != train(source, seed=2)[0].indices


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumption(source: ImageSource, num_workers: int) -> None:
    assert_same(train(source)[5:], train(source, num_steps=3, first_step=5, num_workers=num_workers))


def test_global_random_state_is_left_alone(source: ImageSource) -> None:
    before = torch.get_rng_state()
    train(source)
    evaluate(source)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_workers_than_cores_do_not_warn(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert len(train(source, num_steps=1, num_workers=2)) == 1


def test_evaluation_is_the_centre_crop_in_order(source: ImageSource) -> None:
    batches = evaluate(source)
    assert [batch.indices for batch in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    expected = to_images([adm_crop(source.read(index), 8) for index in range(10)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_evaluation_of_the_first_images(source: ImageSource) -> None:
    assert [batch.indices for batch in evaluate(source, 6)] == [(0, 1, 2, 3), (4, 5)]
    assert sum(len(batch.indices) for batch in evaluate(source, 99)) == 10


def test_workers_change_nothing(tmp_path: Path) -> None:
    source = write_images(tmp_path, 100, broken=(37,))
    assert_same(train(source, 30), train(source, 30, num_workers=2))
    assert_same(evaluate(source), evaluate(source, num_workers=2))


# ---- broken images: one in a hundred is let pass, the second ends the run


def test_broken_image_is_replaced_by_the_next_and_named_once(tmp_path: Path) -> None:
    source = write_images(tmp_path, 100, broken=(99,))
    batches = train(source, num_steps=50)
    visited = [index for batch in batches for index in batch.indices]
    assert 99 not in visited
    for epoch in (visited[:100], visited[100:]):
        assert sorted(epoch) == sorted([*range(99), 0])  # the next of the last is the first
    assert [image.name for batch in batches for image in batch.broken] == [str(tmp_path / "0099.png")]
    healthy = write_images(tmp_path / "healthy", 100)  # the others are cropped as ever
    for batch, expected in zip(batches, train(healthy, num_steps=50), strict=True):
        kept = [place for place, index in enumerate(expected.indices) if index != 99]
        assert torch.equal(batch.images[kept], expected.images[kept])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_images_end_training(tmp_path: Path, num_workers: int) -> None:
    source = write_images(tmp_path, 100, broken=(3, 4))
    with pytest.raises(UserError) as caught:
        train(source, num_steps=50, num_workers=num_workers)
    line = str(caught.value)
    assert line.startswith(f"2 of 100 images of '{tmp_path}' are broken so far, more than 1%; the first is '{tmp_path}")
    assert "\n" not in line
    del caught
    gc.collect()
    assert not multiprocessing.active_children()


def test_all_broken(tmp_path: Path) -> None:
    source = write_images(tmp_path, 5, broken=tuple(range(5)))
    with pytest.raises(UserError, match="1 of 5 images"):
        train(source)
    with pytest.raises(UserError, match=r"1 of 5 images.*the first is '.*0000\.png'"):
        evaluate(source)


@pytest.mark.parametrize("broken", [0, 42, 99])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_broken_image_is_left_out_of_evaluation(tmp_path: Path, broken: int, batch_size: int) -> None:
    batches = evaluate(write_images(tmp_path, 100, broken=(broken,)), batch_size=batch_size)
    assert [index for batch in batches for index in batch.indices] == [n for n in range(100) if n != broken]
    assert all(len(batch.images) == len(batch.indices) > 0 for batch in batches)
    assert [image.name for batch in batches for image in batch.broken] == [str(tmp_path / f"{broken:04}.png")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_images_end_evaluation_at_once(tmp_path: Path, num_workers: int) -> None:
    source = write_images(tmp_path, 200, broken=(20, 21, 30))
    batches = evaluation_batches(source, image_size_px=8, batch_size=4, num_images=None, num_workers=num_workers)
    seen = []
    with pytest.raises(UserError, match=r"3 of 200 images.*the first is '.*0020\.png'"):
        seen.extend(batch.indices[-1] for batch in batches)
    assert max(seen, default=0) < 30


def test_the_limit_is_the_whole_sources_however_few_are_visited(tmp_path: Path) -> None:
    source = write_images(tmp_path, 200, broken=(20, 150))
    assert len(evaluate(source)) == 50
    assert [index for batch in evaluate(source, 50) for index in batch.indices] == [*range(20), *range(21, 50)]


def test_a_spread_sample_is_taken_at_equal_distances(tmp_path: Path) -> None:
    source = write_images(tmp_path, 10)
    batches = evaluation_batches(source, image_size_px=8, batch_size=3, num_images=4, num_workers=0, spread=True)
    assert [index for batch in batches for index in batch.indices] == [0, 2, 5, 7]


def test_leaving_early_ends_the_workers(source: ImageSource) -> None:
    batches = training_batches(source, image_size_px=8, batch_size=4, seed=0, num_steps=1000, num_workers=2)
    assert len(list(islice(batches, 2))) == 2
    batches.close()
    gc.collect()
    assert not multiprocessing.active_children()
