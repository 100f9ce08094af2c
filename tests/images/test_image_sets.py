"""Sample sets: what is written is read, by us and by NumPy as ADM's evaluator does; what is wrong is named."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from eqvae.artifacts.sample_sets import moments_in, write_sample_set
from eqvae.errors import UserError
from eqvae.images import adm_crop, decode_image
from eqvae.images.image_sets import open_reference, open_samples


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)


def read_all(image_set, indices=None, batch_size=3):
    indices = range(len(image_set)) if indices is None else indices
    parts = list(image_set.batches(indices, batch_size=batch_size, num_workers=0))
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def test_a_written_set_is_read_as_adm_reads_it(tmp_path, images):
    labels = np.arange(7, dtype=np.int64)
    write_sample_set(tmp_path / "samples.npz", images, labels)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == images).all()
        assert (arrays["arr_1"] == labels).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("indices", [range(7), range(2, 6), range(1, 7, 2), range(0)])
def test_an_archive_is_streamed(tmp_path, images, save, indices):
    save(tmp_path / "set.npz", images)
    image_set = open_samples(tmp_path / "set.npz")
    assert (len(image_set), image_set.image_size) == (7, (16, 16))
    if len(indices):
        assert (read_all(image_set, indices) == images[list(indices)]).all()
    else:
        assert list(image_set.batches(indices, batch_size=3, num_workers=0)) == []


def test_a_run_s_folder_stands_for_its_samples(tmp_path, images):
    write_sample_set(tmp_path / "samples.npz", images)
    Image.new("RGB", (50, 40)).save(tmp_path / "grid.png")
    assert (read_all(open_samples(tmp_path)) == images).all()
    assert (read_all(open_reference(str(tmp_path), image_size_px=16)) == images).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_of_images(tmp_path, images, num_workers):
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    image_set = open_samples(tmp_path)
    parts = list(image_set.batches(range(1, 7, 2), batch_size=2, num_workers=num_workers))
    assert [len(part) for part in parts] == [2, 1]
    assert (torch.cat(parts).permute(0, 2, 3, 1).numpy() == images[1::2]).all()


def test_a_reference_is_cropped_to_the_samples(photographs):
    image_set = open_reference(str(photographs), image_size_px=32)
    path = sorted(photographs.iterdir())[2]
    assert (read_all(image_set)[2] == adm_crop(decode_image(path, "image"), 32)).all()


def test_a_reference_may_have_a_broken_image_in_a_hundred(tmp_path, images):
    for index in range(100):
        Image.fromarray(images[index % 7]).save(tmp_path / f"{index:03}.png")
    (tmp_path / "005.png").write_bytes(b"no image")
    image_set = open_reference(str(tmp_path), image_size_px=16)
    assert len(read_all(image_set)) == 99
    assert [image.name for image in image_set.broken] == [str(tmp_path / "005.png")]
    (tmp_path / "006.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="2 of 100 images"):
        read_all(open_reference(str(tmp_path), image_size_px=16))


# Faults -------------------------------------------------------------------------------------------------------------


def test_samples_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none.npz' do not exist"):
        open_samples(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"none.npz' does not exist"):
        open_reference(str(tmp_path / "none.npz"), image_size_px=16)


def test_an_archive_that_is_none(tmp_path):
    (tmp_path / "set.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"set.npz' is truncated, damaged or no .npz"):
        open_samples(tmp_path / "set.npz")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_archive(tmp_path, images, keep):
    path = tmp_path / "set.npz"
    np.savez(path, images)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=r"set.npz' is truncated"):
        open_samples(path)


def test_a_flipped_bit_is_found(tmp_path, images):
    path = tmp_path / "set.npz"
    np.savez(path, images)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"set.npz' is truncated, damaged.*CRC"):
        read_all(open_samples(path))


def test_an_array_shorter_than_its_header_says(tmp_path, images):
    path = tmp_path / "set.npz"
    np.savez(path, images)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content[:-100])
    with pytest.raises(UserError, match="has other than 5376 bytes"):
        read_all(open_samples(path))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.zeros((4, 8, 8, 3), np.uint8)}, r"no key 'arr_0' \(keys: images\)"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.int64)}, "int64"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, r"shape \(4, 3, 8, 8\)"),
        ({"arr_0": np.zeros((8, 8, 3), np.uint8)}, r"shape \(8, 8, 3\)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds no image"),
        ({"arr_0": np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8))}, "Fortran"),
        ({"arr_0": np.array([np.zeros((8, 8, 3)), np.zeros((9, 9, 3))], object)}, "mixed sizes"),
        ({}, "keys: none"),
    ],
)
def test_an_archive_of_something_else(tmp_path, arrays, says):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=says):
        open_samples(tmp_path / "set.npz")


def test_samples_and_reference_can_not_be_swapped_unseen(tmp_path, images):
    np.savez(tmp_path / "reference.npz", arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
    assert moments_in(tmp_path / "reference.npz") == {"mu", "sigma"}
    with pytest.raises(UserError, match="Give it as --reference"):
        open_samples(tmp_path / "reference.npz")
    assert len(open_reference(str(tmp_path / "reference.npz"), image_size_px=16)) == 7


def test_mixed_sizes_name_the_first_odd_image(tmp_path, images):
    for index, image in enumerate(images[:3]):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    Image.new("RGB", (16, 17)).save(tmp_path / "25.png")
    with pytest.raises(UserError, match=r"25.png' has 16 x 17 px, the first one has 16 x 16 px"):
        open_samples(tmp_path)


def test_samples_that_are_not_square(tmp_path):
    Image.new("RGB", (16, 17)).save(tmp_path / "0.png")
    samples = open_samples(tmp_path)
    assert str(samples.image_size) == "17x16"  # height x width
    reference = open_reference("photos", image_size_px=samples.image_size)
    assert next(iter(reference.batches(range(2), batch_size=2, num_workers=0))).shape == (2, 3, 17, 16)


def test_a_broken_sample_is_no_detail(tmp_path, images):
    for index in range(200):
        Image.fromarray(images[index % 7]).save(tmp_path / f"{index:03}.png")
    content = (tmp_path / "100.png").read_bytes()
    (tmp_path / "100.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"100.png' .*cannot be decoded"):
        read_all(open_samples(tmp_path))
    (tmp_path / "100.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"100.png' .*cannot be decoded"):
        open_samples(tmp_path)


def test_a_reference_of_another_size(tmp_path, images):
    np.savez(tmp_path / "set.npz", images)
    with pytest.raises(UserError, match="images of 16 px, the samples have 32 px"):
        open_reference(str(tmp_path / "set.npz"), image_size_px=32)
