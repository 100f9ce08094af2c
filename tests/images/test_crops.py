"""The crops against independent references and known properties."""

import numpy as np
import pytest
import torch
from PIL import Image

from eqvae.artifacts.records import to_uint8
from eqvae.images import adm_crop, ldm_random_crop, to_images


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height: int, width: int) -> Image.Image:
    """Red is the column, green the row, both scaled to 0 ... 255."""
    row, column = np.mgrid[:height, :width]
    channels = (column * 255 / (width - 1), row * 255 / (height - 1), np.zeros((height, width)))
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 50), (100, 70), (64, 64), (300, 65), (7, 9), (129, 260)])
def test_adm_crop_size(height: int, width: int) -> None:
    crop = adm_crop(Image.fromarray(noise(height, width)), 32)
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == np.uint8


def test_adm_crop_leaves_an_image_of_its_size_alone() -> None:
    array = noise(48, 48)
    assert np.array_equal(adm_crop(Image.fromarray(array), 48), array)


def test_adm_crop_of_the_right_height_cuts_only() -> None:
    array = noise(16, 37)
    assert np.array_equal(adm_crop(Image.fromarray(array), 16), array[:, 10:26])  # (37 - 16) // 2 = 10


def halve(array: np.ndarray) -> np.ndarray:
    """Means of two, along rows and then along columns, halves rounded up each time: PIL's box filter in 8 bits."""
    array = array.astype(int)
    array = (array[:, 0::2] + array[:, 1::2] + 1) // 2
    return (array[0::2] + array[1::2] + 1) // 2


def test_adm_crop_halves_by_means_of_four() -> None:
    array = noise(64, 64)
    assert np.array_equal(adm_crop(Image.fromarray(array), 32), halve(array))


def test_adm_crop_halves_again_and_again() -> None:
    array = noise(64, 128)
    assert np.array_equal(adm_crop(Image.fromarray(array), 16), halve(halve(array))[:, 8:24])


def test_adm_crop_resizes_bicubically_below_twice_the_size() -> None:
    array = noise(63, 80)
    width = round(80 * 32 / 63)
    resized = np.asarray(Image.fromarray(array).resize((width, 32), Image.Resampling.BICUBIC))
    left = (width - 32) // 2
    assert np.array_equal(adm_crop(Image.fromarray(array), 32), resized[:, left : left + 32])


def test_ldm_crop_follows_its_generator() -> None:
    image = Image.fromarray(noise(60, 90))
    first, again, other = (ldm_random_crop(image, 32, np.random.default_rng(seed), flip=True) for seed in (1, 1, 2))
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_ldm_crop_sides_and_places() -> None:
    height, width, size = 101, 161, 8
    image = gradient(height, width)
    sides, lefts = [], []
    for seed in range(300):
        crop = ldm_random_crop(image, size, np.random.default_rng(seed), flip=False).astype(float)
        pixel = (crop[0, -1, 0] - crop[0, 0, 0]) / 255 * (width - 1) / (size - 1)  # source pixels for each pixel
        sides.append(pixel * size)
        lefts.append(crop[0, 0, 0] / 255 * (width - 1) - pixel / 2)
        rows = (crop[-1, 0, 1] - crop[0, 0, 1]) / 255 * (height - 1) / (size - 1) * size
        assert abs(rows - sides[-1]) < 4  # square
    assert 0.5 * height - 3 < min(sides) < 0.55 * height
    assert 0.95 * height < max(sides) < height + 3
    assert np.mean(sides) == pytest.approx(0.75 * height, rel=0.04)
    assert min(lefts) < 4
    assert max(lefts) > width - height / 2 - 20


def test_ldm_crop_flips_half_of_the_time_and_nothing_else() -> None:
    image = gradient(40, 40)
    num_flipped = 0
    for seed in range(200):
        plain, flipped = (ldm_random_crop(image, 16, np.random.default_rng(seed), flip=flip) for flip in (False, True))
        assert plain[0, 0, 0] < plain[0, -1, 0]
        if np.array_equal(flipped, plain[:, ::-1]):
            num_flipped += 1
        else:
            assert np.array_equal(flipped, plain)
    assert 70 < num_flipped < 130


def test_ldm_crop_takes_means_when_it_shrinks() -> None:
    checkers = np.indices((256, 256)).sum(0) % 2 * 255
    image = Image.fromarray(checkers.astype(np.uint8)).convert("RGB")
    crop = ldm_random_crop(image, 8, np.random.default_rng(0), flip=False)
    assert np.abs(crop.astype(int) - 127.5).max() < 10  # nearest or bilinear sampling would alias


def test_ldm_crop_of_tiny_images() -> None:
    for height, width in ((1, 1), (1, 5), (2, 3)):
        assert ldm_random_crop(gradient(height + 1, width + 1), 8, np.random.default_rng(0), flip=True).shape == (
            8,
            8,
            3,
        )
    one = Image.new("RGB", (1, 1), (9, 8, 7))
    assert (ldm_random_crop(one, 4, np.random.default_rng(0), flip=True) == [9, 8, 7]).all()


def test_to_images_range_and_round_trip() -> None:
    arrays = [np.arange(192, dtype=np.uint8).reshape(8, 8, 3), np.full((8, 8, 3), 255, np.uint8)]
    images = to_images(arrays)
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert images[0, 0, 0, 0] == -1.0
    assert (images[1] == 1.0).all()
    assert np.array_equal(to_uint8(images).permute(0, 2, 3, 1).numpy(), np.stack(arrays))
