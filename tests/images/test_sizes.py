"""Sizes of crops: how they are written, which image is cut to which, and whose turn it is."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from eqvae.errors import UserError
from eqvae.images import ImageSize, ImageSource, adm_crop, encoding_batches, ldm_random_crop, open_images
from eqvae.images.loader import training_batches
from eqvae.images.sizes import (
    Buckets,
    bucket_at,
    bucket_sizes,
    describe_buckets,
    read_sizes,
    sort_into_buckets,
    split_by_size,
    write_sizes,
)
from eqvae.runtime.processes import ALONE

SIZES = [(64, 64), (96, 64), (64, 96), (90, 60), (70, 64), (400, 40), (64, 128)]
"""Width and height."""


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Pictures of one colour each, of several aspects."""
    for index, size in enumerate(SIZES):
        Image.new("RGB", size, (10 * index, 0, 0)).save(tmp_path / f"{index}.png")
    return open_images(str(tmp_path))


def sort(source: ImageSource, text: str, *, aspect_buckets: bool = True) -> Buckets:
    sizes = bucket_sizes(read_sizes(text), aspect_buckets=aspect_buckets, unit_px=8)
    return sort_into_buckets(source, sizes, ALONE)


@pytest.mark.parametrize(
    ("text", "written"), [(256, 256), ("256", 256), ("256x256", 256), ("192x256", "192x256"), (" 64, 128", "64,128")]
)
def test_sizes_are_written_in_one_way(text, written):
    assert write_sizes(read_sizes(text)) == written
    assert read_sizes(written) == read_sizes(text)


@pytest.mark.parametrize("text", ["0", 0, -8, "64x0", "64,", "x64", "64x", "64x64x3", "a", "", "64,64", "1e3", "²"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="--image-size"):
        read_sizes(text)


def test_sizes_of_buckets_are_of_about_as_many_pixels():
    sizes = [each for (each,) in bucket_sizes(read_sizes(256), aspect_buckets=True, unit_px=16)]
    assert ImageSize(256, 256) in sizes
    assert {ImageSize(size.width, size.height) for size in sizes} == set(sizes)  # each one lies on its side too
    for size in sizes:
        assert all(side % 16 == 0 for side in size)
        assert max(size) <= 2 * min(size)
        assert size.num_pixels == pytest.approx(256**2, rel=0.1)
    aspects = [size.width / size.height for size in sizes]
    assert aspects == sorted(set(aspects))


def test_sizes_of_one_aspect_share_a_bucket():
    sizes = bucket_sizes(read_sizes("64,32x64,32,64x128"), aspect_buckets=False, unit_px=8)
    assert sizes == [((64, 64), (32, 32)), ((32, 64), (64, 128))]


def test_each_resolution_has_every_bucket():
    sizes = bucket_sizes(read_sizes("64,128"), aspect_buckets=True, unit_px=8)
    assert all(np.isclose(small.width / small.height, large.width / large.height, rtol=0.15) for small, large in sizes)
    assert len({large for _, large in sizes}) == len(sizes)


def test_a_resolution_that_is_no_multiple():
    with pytest.raises(UserError, match=r"--image-size 60 is no multiple of 8.*Use 56 or 64"):
        bucket_sizes(read_sizes(60), aspect_buckets=True, unit_px=8)
    with pytest.raises(UserError, match="takes resolutions"):
        bucket_sizes(read_sizes("48x64"), aspect_buckets=True, unit_px=8)


def test_each_image_goes_to_the_nearest_aspect(source):
    buckets = sort(source, "64")
    found = {int(index): bucket.sizes[0] for bucket in buckets for index in bucket.members}
    assert sorted(found) == list(range(len(SIZES)))
    assert (found[0], found[6]) == ((64, 64), max(found.values()))
    for index in (1, 2, 3):
        width, height = SIZES[index]
        assert found[index].width / found[index].height == pytest.approx(width / height, rel=0.2)
    assert found[5].width > found[5].height  # wider than any bucket: the widest
    assert "2 images at 64, 2 images at 56x72" in describe_buckets(buckets)


def test_buckets_see_pictures_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "0.jpg", exif=exif)
    Image.new("RGB", (96, 64)).save(tmp_path / "1.tif", tiffinfo={274: 6})
    Image.new("RGB", (96, 64)).save(tmp_path / "2.png")
    source = open_images(str(tmp_path))
    assert [source.size(index) for index in range(3)] == [source.read(index).size for index in range(3)]
    assert [source.size(index) for index in range(3)] == [(64, 96), (64, 96), (96, 64)]


def test_a_damaged_header_stops_no_run(tmp_path, source):
    (tmp_path / "3.png").write_bytes(b"broken")
    buckets = sort(source, "64")
    assert sum(len(bucket.members) for bucket in buckets) == len(SIZES)


def test_one_size_reads_no_header(tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    (bucket,) = sort(open_images(str(tmp_path)), "48x64", aspect_buckets=False)
    assert (bucket.sizes, list(bucket.members)) == (((48, 64),), [0])


@pytest.mark.parametrize("counts", [(5,), (3, 1, 4), (1, 1)])
def test_each_bucket_has_its_turns(counts):
    num_steps = sum(counts)
    for cycle in range(3):
        turns = [bucket_at(step, counts, 7) for step in range(cycle * num_steps, (cycle + 1) * num_steps)]
        assert Counter(bucket for bucket, _ in turns) == dict(enumerate(counts))
        for bucket, count in enumerate(counts):
            numbers = [number for each, number in turns if each == bucket]
            assert numbers == list(range(cycle * count, (cycle + 1) * count))


def test_images_are_dealt_out_to_resolutions(source):
    parts = list(split_by_size(sort(source, "32,64,96", aspect_buckets=False)))
    assert [(size.width, list(own)) for size, own in parts] == [(32, [0, 3, 6]), (64, [1, 4]), (96, [2, 5])]


def batches(source: ImageSource, buckets: Buckets, first_step: int, num_steps: int, **options):
    settings = {"batch_size": 3, "seed": 5, "num_workers": 0} | options
    return list(training_batches(source, image_size_px=buckets, first_step=first_step, num_steps=num_steps, **settings))


def test_batches_of_buckets_can_be_resumed_and_shared_out(source):
    buckets = sort(source, "32,64")
    whole = batches(source, buckets, 0, 14)
    assert len({batch.crops.shape for batch in whole}) > 3
    for batch in whole:
        owners = [bucket for bucket in buckets if batch.crops.shape[1:3] in bucket.sizes]
        assert any(set(batch.indices) <= set(map(int, bucket.members)) for bucket in owners)
    for one, again in zip(whole[9:], batches(source, buckets, 9, 5), strict=True):
        assert one.indices == again.indices
        assert one.crops.equal(again.crops)
    for one, part in zip(whole, batches(source, buckets, 0, 14, rows=[2]), strict=True):
        assert one.crops[2:].equal(part.crops)
    seen = Counter(index for batch in batches(source, buckets, 0, 7 * len(SIZES)) for index in batch.indices)
    assert set(seen.values()) == {21}  # every image as often as any other


def test_a_broken_image_of_a_bucket_is_replaced(tmp_path, source, monkeypatch):
    monkeypatch.setattr("eqvae.images.loader.MAX_BROKEN_PERCENT", 20)
    buckets = sort(source, "64")
    (tmp_path / "6.png").write_bytes(b"broken")  # alone in its bucket
    found = [batch for batch in batches(source, buckets, 0, 7) if batch.crops.shape[1:3] == buckets[0].sizes[0]]
    assert [batch.indices for batch in found] == [(0, 0, 0)]  # the next one of the source, cut to the bucket's size
    assert [len(batch.broken) for batch in found] == [1]


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (8, 8), (200, 7), (7, 200), (64, 48)])
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (16, 16), (8, 40)])
def test_crops_have_their_size_and_cover_it(height, width, size):
    image = Image.fromarray(np.full((height, width, 3), 200, np.uint8))
    for seed in range(3):
        for crop in (adm_crop(image, size), ldm_random_crop(image, size, np.random.default_rng(seed), flip=True)):
            assert crop.shape == (*size, 3)
            assert (crop == 200).all()  # nothing from outside


def test_a_crop_keeps_the_aspect():
    rows, columns = np.mgrid[0:90, 0:120]
    pixels = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    crop = adm_crop(Image.fromarray(pixels), (30, 60)).astype(float)  # 60 rows of 90 are kept, both halved
    assert np.abs(np.diff(crop[:, 5:-5, 1], axis=1) - 2).max() < 1
    assert np.abs(np.diff(crop[5:-5, :, 0], axis=0) - 2).max() < 1
    assert crop[0, 0, 0] == pytest.approx(15, abs=1.5)
    random = ldm_random_crop(Image.fromarray(pixels), (30, 60), np.random.default_rng(0), flip=False).astype(float)
    assert np.diff(random[:, :, 1], axis=1).mean() == pytest.approx(np.diff(random[:, :, 0], axis=0).mean(), rel=0.1)


def test_parts_have_sizes_of_their_own(source):
    sizes = [ImageSize(8, 16), ImageSize(16, 8)]
    found = list(encoding_batches(source, image_size_px=sizes, parts=[[0, 1], [2]], num_workers=0))
    assert [tuple(batch.crops.shape) for batch in found] == [(2, 8, 16, 3), (1, 16, 8, 3)]
