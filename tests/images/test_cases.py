"""Data as people have them: each pattern of public reports, with what is right beside it.

A reader never chooses or drops silently: what `describe()` says is part of what is right.
"""

import gc
import io
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from eqvae.errors import UserError, printable
from eqvae.images import BrokenImageError, ImageSource, adm_crop, decode_image, evaluation_batches, open_images, tables

SIDE_PX = 24
DESCRIPTORS = Path("/proc/self/fd")


def encoded(colour: int | tuple[int, ...], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", (SIDE_PX, SIDE_PX), colour).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = [encoded((i * 20, 100, 50)) for i in range(12)]
MASKS = [encoded(i * 20) for i in range(12)]


def tar(path: Path, members: Sequence[tuple[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def parquet(path: Path, row_group_size: int | None = None, **columns: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def cells(images: Sequence[bytes]) -> list[dict[str, bytes | None]]:
    return [{"bytes": image, "path": None} for image in images]


def files(folder: Path, *names: str, content: bytes | None = None) -> str:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or PICTURES[number % len(PICTURES)])
    return str(folder)


def labels(source: ImageSource) -> list[int | None]:
    return [source.class_of(index) for index in range(len(source))]


def reds(source: ImageSource) -> list[int]:
    """The red of each image: 20 times its number."""
    return [source.read(index).getpixel((0, 0))[0] // 20 for index in range(len(source))]


# ---- tar shards: one picture for each sample


def test_masks_are_no_pictures(tmp_path: Path) -> None:
    masks_first = [m for i in range(4) for m in ((f"{i:04d}.mask.png", MASKS[i]), (f"{i:04d}.png", PICTURES[i]))]
    source = open_images(tar(tmp_path / "a.tar", masks_first))
    assert reds(source) == [0, 1, 2, 3]
    assert source.describe() == (
        "4 images, no classes (they lie in no class folders), 4 left out (4 .mask.png beside .png); "
        "--image-column chooses another"
    )
    masks = open_images(source.name, image_column="mask.png")
    assert [masks.label(index).split("[")[1] for index in range(4)] == [f"{i:04d}.mask.png]" for i in range(4)]
    assert len(open_images(source.name, image_column="all")) == 8


def test_the_depth_beside_another_format(tmp_path: Path) -> None:
    jpegs = [encoded((i * 20, 9, 9), "JPEG") for i in range(4)]
    members = [m for i in range(4) for m in ((f"{i:04d}.depth.png", MASKS[i]), (f"{i:04d}.jpg", jpegs[i]))]
    source = open_images(tar(tmp_path / "a.tar", members))
    assert [source.label(index).rpartition(".")[2] for index in range(len(source))] == ["jpg]"] * 4
    assert "4 .depth.png beside .jpg" in source.describe()
    both_plain = open_images(tar(tmp_path / "b.tar", [("0.png", MASKS[0]), ("0.jpg", jpegs[1])]))
    assert both_plain.label(0).endswith("[0.jpg]")
    assert "1 .png beside .jpg" in both_plain.describe()


def test_dots_in_names(tmp_path: Path) -> None:
    source = open_images(tar(tmp_path / "a.tar", [(f"22.{i:02d}.png", PICTURES[i]) for i in range(6)]))
    assert reds(source) == list(range(6))
    words = [("v1.cat.png", PICTURES[0]), ("v1.dog.png", PICTURES[1]), ("v2.owl.png", PICTURES[2])]
    assert len(open_images(tar(tmp_path / "b.tar", words))) == 3


def test_labels_of_names_with_dots(tmp_path: Path) -> None:
    members = [m for i in range(4)
               for m in ((f"a/1.2.840.{i}.png", PICTURES[i]), (f"a/1.2.840.{i}.cls", str(i).encode()))]  # fmt: skip
    source = open_images(tar(tmp_path / "a.tar", members))
    assert (reds(source), labels(source)) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_the_picture_among_named_ones(tmp_path: Path) -> None:
    members = [m for i in range(2) for m in ((f"{i}.depth.png", MASKS[i]), (f"{i}.image.png", PICTURES[i]),
                                             (f"{i}.cls", b"7"))]  # fmt: skip
    source = open_images(tar(tmp_path / "a.tar", members))
    assert (reds(source), source.class_names) == ([0, 1], ("7",))
    assert "2 .depth.png beside .image.png" in source.describe()


def test_nothing_is_chosen_where_no_name_tells(tmp_path: Path) -> None:
    members = [m for i in range(2) for m in ((f"{i}.left.png", PICTURES[i]), (f"{i}.right.png", PICTURES[i]))]
    data = tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"several images of each sample \(left\.png, right\.png\).*--image-column"):
        open_images(data)
    assert len(open_images(data, image_column="left")) == 2
    with pytest.raises(UserError, match="holds no image"):
        open_images(data, image_column="middle")


def test_images_of_any_ending_inside(tmp_path: Path) -> None:
    members = [("a.jfif", encoded((20, 9, 9), "JPEG")), ("b", PICTURES[0]), ("c.txt", b"words"), ("d.json", b"{}")]
    source = open_images(tar(tmp_path / "a.tar", members))
    assert len(source) == 2
    assert "2 left out (1 .json, 1 .txt)" in source.describe()


def test_members_named_twice_links_and_hidden_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    tar(path, [("0.png", PICTURES[0]), ("0.png", PICTURES[5]), (".hidden.png", PICTURES[1])])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = open_images(str(path))
    assert reds(source) == [5]  # as when it is unpacked
    assert "3 left out (1 hidden, 1 links, devices or sparse files, 1 replaced by a later member" in source.describe()


def test_splits_inside_an_archive(tmp_path: Path) -> None:
    members = [(f"{split}/{name}/0.png", PICTURES[0]) for split in ("train", "val") for name in ("cat", "dog")]
    source = open_images(tar(tmp_path / "a.tar", [*members, ("train/cat/1.png", PICTURES[1])]))
    assert (source.class_names, labels(source)) == (("cat", "dog"), [0, 1, 0])
    assert "2 of the split 'val'" in source.describe()


def test_absolute_beside_relative_names(tmp_path: Path) -> None:
    source = open_images(tar(tmp_path / "a.tar", [("/cat/0.png", PICTURES[0]), ("dog/1.png", PICTURES[1])]))
    assert source.class_names == ("cat", "dog")


# ---- tables


def test_the_image_column_by_its_usual_name(tmp_path: Path) -> None:
    data = parquet(tmp_path / "a.parquet", conditioning_image=cells(MASKS), image=cells(PICTURES))
    source = open_images(data)
    assert reds(source) == list(range(12))
    assert source.describe().endswith("; images of 'image', not of 'conditioning_image' (--image-column chooses)")
    masks = open_images(data, image_column="conditioning_image")
    assert masks.read(3).getpixel((0, 0)) == (60, 60, 60)
    with pytest.raises(UserError, match=r"no column 'images'\. Did you mean 'image'\?"):
        open_images(data, image_column="images")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([i % 3 + 1 for i in range(12)], ("1", "2", "3")),
        ([[0, 5, 99][i % 3] for i in range(12)], ("0", "5", "99")),
        ([float(i % 3) for i in range(12)], ("0", "1", "2")),
        ([["10", "9", "b"][i % 3] for i in range(12)], ("9", "10", "b")),
        ([b"owl"] * 4 + [b"cat"] * 8, ("cat", "owl")),
        ([i % 2 == 0 for i in range(12)], ("false", "true")),
    ],
)
def test_classes_are_those_that_occur(tmp_path: Path, values: list, names: tuple[str, ...]) -> None:
    source = open_images(parquet(tmp_path / "a.parquet", image=cells(PICTURES), label=values))
    assert source.class_names == names
    assert f"{len(names)} classes ({', '.join(names)})" in source.describe()
    written = [str(value).lower() if isinstance(value, bool) else value for value in values]
    written = [value.decode() if isinstance(value, bytes) else value for value in written]
    written = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in written]
    assert [names[label] for label in labels(source)] == written


def test_categories_of_pandas(tmp_path: Path) -> None:
    column = pa.array(["owl", "cat", "owl"]).dictionary_encode()
    pq.write_table(pa.table({"image": cells(PICTURES[:3]), "label": column}), tmp_path / "a.parquet")
    assert labels(open_images(str(tmp_path))) == [1, 0, 1]


def test_numbers_written_as_text(tmp_path: Path) -> None:
    source = open_images(parquet(tmp_path / "a.parquet", image=cells(PICTURES), label=[str(i) for i in range(12)]))
    assert source.class_names == tuple(map(str, range(12)))
    assert labels(source) == list(range(12))


@pytest.mark.parametrize(
    ("values", "why"),
    [([0.5, 1.0], r"column 'label' holds numbers that are not whole"), ([[1], [2]], "column 'label' holds list"),
     ([None, None], "column 'label' is empty")],
)  # fmt: skip
def test_labels_that_are_none_are_said(tmp_path: Path, values: list, why: str) -> None:
    source = open_images(parquet(tmp_path / "a.parquet", image=cells(PICTURES[:2]), label=values))
    assert source.class_names is None
    assert f"2 images, no classes ({why}" in source.describe()


def test_a_gap_in_labels_is_said_and_stops_who_needs_them(tmp_path: Path) -> None:
    data = parquet(tmp_path / "a.parquet", image=cells(PICTURES[:2]), label=[1.0, float("nan")])
    source = open_images(data)
    assert "no classes ('" in source.describe()
    assert "a.parquet[1]' has no label" in source.describe()
    with pytest.raises(UserError, match="has no label"):
        source.class_of(0)


def test_two_label_columns(tmp_path: Path) -> None:
    source = open_images(parquet(tmp_path / "a.parquet", img=cells(PICTURES[:2]), fine_label=[0, 1], cls=[3, 3]))
    assert source.class_names == ("0", "1")
    assert source.describe().endswith("labels of 'fine_label', not of 'cls' (--label-column chooses)")


def test_classes_of_the_first_images(tmp_path: Path) -> None:
    data = parquet(tmp_path / "a.parquet", image=cells(PICTURES), label=[i // 4 for i in range(12)])
    source = open_images(data).labelled_up_to(5)
    assert (source.class_names, source.class_of(4)) == (("0", "1"), 1)
    assert source.fingerprint() == open_images(data).fingerprint()


@pytest.mark.parametrize("num_empty", [1, 40])
def test_empty_cells_first(tmp_path: Path, num_empty: int) -> None:
    column = [None] * num_empty + cells(PICTURES)
    source = open_images(parquet(tmp_path / "a.parquet", row_group_size=7, image=column, x=[0] * len(column)))
    assert len(source) == num_empty + 12
    with pytest.raises(BrokenImageError, match=r"a\.parquet\[0\]' cannot be decoded: .*the cell is empty"):
        source.read(0)
    assert source.read(num_empty + 3).getpixel((0, 0))[0] == 60


def test_images_in_a_dictionary(tmp_path: Path) -> None:
    column = pa.array([PICTURES[1], PICTURES[2], PICTURES[1]], pa.binary()).dictionary_encode()
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    assert reds(open_images(str(tmp_path))) == [1, 2, 1]


def test_a_file_without_any_cell_filled(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", image=[None, None])
    parquet(tmp_path / "b.parquet", image=cells(PICTURES[:2]))
    assert open_images(str(tmp_path)).read(3).getpixel((0, 0))[0] == 20


def test_tables_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    parquet(tmp_path / "one" / "a.parquet", row_group_size=5, image=cells(PICTURES))
    first = open_images(str(tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "two")
    source = open_images(str(tmp_path / "two"))
    order = [11, 0, 7, 4, 5, 0]
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(index).getpixel((0, 0))[0] // 20 for index in order] == order
    assert source.fingerprint() == first.fingerprint()
    assert not (tmp_path / "home").exists()


def test_a_table_of_large_row_groups_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tables, "_MAX_GROUP_BYTES", 100)
    monkeypatch.setattr(tables, "_MAX_KEPT_BYTES", 100)
    monkeypatch.setattr(tables, "_UNPACKED_ROWS", 5)
    parquet(tmp_path / "one" / "a.parquet", image=cells(PICTURES))
    assert reds(open_images(str(tmp_path / "one"))) == list(range(12))
    assert "unpacked once" in capsys.readouterr().err
    (tmp_path / "one").rename(tmp_path / "two")
    source = pickle.loads(pickle.dumps(open_images(str(tmp_path / "two"))))
    assert reds(source) == list(range(12))
    assert source.label(7) == f"{tmp_path / 'two' / 'a.parquet'}[7]"
    assert not capsys.readouterr().err
    assert len(list((tmp_path / "home").rglob("*.arrow"))) == 1


def test_paths_in_cells_begin_at_the_table(tmp_path: Path) -> None:
    files(tmp_path / "data", "images/a.png")
    data = parquet(tmp_path / "data" / "a.parquet", image=[{"bytes": None, "path": "images/a.png"}])
    assert reds(open_images(data)) == [0]


# ---- folders


def test_numbered_folders(tmp_path: Path) -> None:
    source = open_images(files(tmp_path, *(f"{i}/0.png" for i in range(12))))
    assert source.class_names == tuple(map(str, range(12)))
    assert sorted(labels(source)) == list(range(12))


def test_an_image_beside_the_class_folders(tmp_path: Path) -> None:
    source = open_images(files(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "cover.png"))
    assert source.class_names is None
    assert source.describe() == "5 images, no classes (1 of the images lies beside the class folders)"


@pytest.mark.parametrize(("split", "chosen"), [("train", "train"), ("evaluation", "val")])
def test_splits_are_no_classes(tmp_path: Path, split: str, chosen: str) -> None:
    files(tmp_path, *(f"{each}/{name}/{i}.png" for each in ("train", "val") for name in ("cat", "dog") for i in (0, 1)))
    source = open_images(str(tmp_path), split=split)
    assert (source.class_names, labels(source)) == (("cat", "dog"), [0, 0, 1, 1])
    assert all(f"/{chosen}/" in source.label(index) for index in range(4))
    other = {"train": "val", "val": "train"}[chosen]
    assert source.describe() == f"4 images, 2 classes (cat, dog), 4 left out (4 of the split '{other}')"
    assert labels(open_images(f"{tmp_path}/*/*/*.png")) == [0, 0, 1, 1] * 2  # a glob says which ones are meant
    assert open_images(str(tmp_path / "val")).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("tops", "chosen"),
    [(("train2017", "val2017"), "train2017"), (("training_set", "test_set"), "training_set"),
     (("train", "test", "unlabeled"), "train"), (("Train", "Test"), "Train"), (("train",), "train")],
)  # fmt: skip
def test_what_splits_are_called(tmp_path: Path, tops: tuple[str, ...], chosen: str) -> None:
    source = open_images(files(tmp_path, *(f"{top}/{name}/0.png" for top in tops for name in ("cat", "dog")), "x.png"))
    assert source.class_names == ("cat", "dog")
    assert f"/{chosen}/" in source.label(0)
    assert "1 beside the splits" in source.describe()


@pytest.mark.parametrize(
    "tops", [("train", "bus"), ("test_tube", "train_station"), ("extra", "unlabeled"), ("eval", "x")]
)
def test_what_classes_are_called(tmp_path: Path, tops: tuple[str, ...]) -> None:
    assert open_images(files(tmp_path, *(f"{top}/0.png" for top in tops))).class_names == tuple(sorted(tops))


def test_a_split_alone_and_a_split_that_is_not_there(tmp_path: Path) -> None:
    files(tmp_path / "one", "Train/cat/0.png", "Train/dog/0.png")
    assert open_images(str(tmp_path / "one")).class_names == ("cat", "dog")
    files(tmp_path / "two", "val/cat/0.png", "test/cat/0.png")
    with pytest.raises(UserError, match=r"has no split for train\. Name one of: .*/two/test, .*/two/val"):
        open_images(str(tmp_path / "two"))


def test_links_are_followed_once(tmp_path: Path) -> None:
    data = files(tmp_path / "data", "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    (tmp_path / "data" / "a" / "parent").symlink_to("..")
    (tmp_path / "data" / "a" / "above").symlink_to("../..")
    (tmp_path / "data" / "0").symlink_to("b")  # before what it leads to
    (tmp_path / "data" / "b" / "2.png").symlink_to("1.png")
    (tmp_path / "data" / "b" / "3.png").symlink_to("nowhere.png")
    os.link(tmp_path / "data" / "a" / "1.png", tmp_path / "data" / "b" / "4.png")
    source = open_images(data)
    assert [source.label(index).removeprefix(data) for index in range(len(source))] == [
        "/a/0.png", "/a/1.png", "/b/0.png", "/b/1.png"
    ]  # fmt: skip
    assert source.class_names == ("a", "b")
    assert source.describe().endswith(
        "6 left out (1 links to folders above, 2 links to folders met before, 1 links to nothing, "
        "2 met before under another name)"
    )
    assert len(open_images(f"{data}/**/*.png")) == 4


def test_names_are_bytes(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "data") + b"/caf\xe9"
    files(Path(os.fsdecode(folder)), os.fsdecode(b"\xff.png"), "plain.png")
    files(tmp_path / "data", "tea\x1b[31m/0.png")
    source = pickle.loads(pickle.dumps(open_images(str(tmp_path / "data"))))
    assert source.class_names == (r"caf\xe9", r"tea\x1b[31m")
    assert [source.read(index).size for index in range(3)] == [(SIDE_PX, SIDE_PX)] * 3
    assert {source.label(0), source.label(1)} == {
        f"{tmp_path}/data/caf\\xe9/\\xff.png", f"{tmp_path}/data/caf\\xe9/plain.png"
    }  # fmt: skip
    assert len(source.fingerprint()) == 16


def test_names_in_archives_are_bytes(tmp_path: Path) -> None:
    members = [(os.fsdecode(b"caf\xe9/\xe8.png"), PICTURES[0]), ("tea/1.png", PICTURES[1])]
    source = pickle.loads(pickle.dumps(open_images(tar(tmp_path / "a.tar", members))))
    assert source.class_names == (r"caf\xe9", "tea")
    assert source.label(0) == rf"{tmp_path}/a.tar[caf\xe9/\xe8.png]"
    assert reds(source) == [0, 1]


def test_what_is_an_image_by_its_first_bytes_is_one(tmp_path: Path) -> None:
    jpeg = encoded((90, 9, 9), "JPEG")
    files(tmp_path, "a.jpg", "b.jfif", "c.jpe", "d.HEIC", "e", content=jpeg)
    files(tmp_path, "f.txt", "g", "h.txt", content=b"BM, which begins like a bitmap")
    files(tmp_path, ".hidden/i.png", ".j")
    source = open_images(str(tmp_path))
    assert len(source) == 5
    assert source.describe() == (
        "5 images, no classes (they lie in no class folders), 5 left out (2 .txt, 2 hidden, 1 without ending)"
    )


@pytest.mark.parametrize("data", ["", " ", "a\0b", "a" * 5000, "no/such/" * 2000, "~nobody/x", "\udce9"])
def test_paths_that_lead_nowhere(data: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_images(data)


def test_many_kinds_of_other_files_are_summed_up(tmp_path: Path) -> None:
    files(tmp_path, *(f"{i}.{kind}" for kind in "abcdefgh" for i in range(2)), "0.z", "1.z", "2.z", content=b"words")
    files(tmp_path, "x.png")
    assert "19 left out (2 .a, 2 .b, 2 .c, 2 .d, 3 .z, 8 of other kinds)" in open_images(str(tmp_path)).describe()


def test_tables_beside_images_are_named(tmp_path: Path) -> None:
    files(tmp_path, "0.png")
    parquet(tmp_path / "a.parquet", image=cells(PICTURES))
    assert "1 left out (1 .parquet)" in open_images(str(tmp_path)).describe()


def test_pipes_are_left_out(tmp_path: Path) -> None:
    files(tmp_path, "0.png")
    os.mkfifo(tmp_path / "1.png")
    assert "1 left out (1 pipes, sockets or devices)" in open_images(str(tmp_path)).describe()
    with pytest.raises(UserError, match="neither a file nor a folder"):
        open_images(str(tmp_path / "1.png"))
    data = parquet(tmp_path / "t" / "a.parquet", image=[*cells(PICTURES[:1]), {"bytes": None, "path": "../1.png"}])
    with pytest.raises(BrokenImageError, match="it is no file"):
        open_images(data).read(1)


# ---- pictures


def png_with(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE_PX, SIDE_PX), (9, 99, 9)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def long_text(is_compressed: bool) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=is_compressed)
    info.add_itxt("more", "y" * 2_000_000, zip=is_compressed)
    return info


@pytest.mark.parametrize(
    "content",
    [
        png_with(pnginfo=long_text(True)),
        png_with(pnginfo=long_text(False)),
        png_with(icc_profile=os.urandom(2_000_000)),
        png_with(icc_profile=b"no profile"),
        png_with()[:33] + b"\x00\x00\x00\x04zTXtabcdXXXX" + png_with()[33:],  # a wrong checksum
        png_with()[:33] + b"\x00\x00\x00\x02pHYsabXXXX" + png_with()[33:],
        png_with()[:33] + b"\x00\x00\x00\x04acTLabcdXXXX" + png_with()[33:],
        png_with()[:-12] + b"\x00\x00\x00\x04tEXtabcdXXXX" + png_with()[-12:],  # after the pixels
    ],
)
def test_metadata_do_not_decide_about_pixels(content: bytes, tmp_path: Path) -> None:
    assert decode_image(content, "it").getpixel((5, 5)) == (9, 99, 9)
    assert reds(open_images(files(tmp_path, "a.bin", content=content))) == [0]


def test_the_orientation_stays_where_texts_are_left_out() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif, pnginfo=long_text(True))
    decoded = decode_image(buffer.getvalue(), "it")
    assert (decoded.size, decoded.getpixel((3, 0))) == ((4, 8), (255, 0, 0))


def test_a_jpeg_s_segments_of_other_programs() -> None:
    plain = encoded((90, 9, 9), "JPEG", quality=95)
    for marker in (0xE2, 0xE3, 0xED, 0xFE):
        for body in (b"MPF\0II*\0\x08\0\0\0\xff\xff", b"ICC_PROFILE\0\x01\x01" + bytes(60_000), b"Photoshop 3.0\0\xff"):
            segment = bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body
            image = decode_image(plain[:2] + segment + plain[2:], "it")
            assert (np.asarray(image) == np.asarray(decode_image(plain, "it"))).all()


@pytest.mark.parametrize("size", [(2, 16_000), (16_000, 2), (1, 100_000), (3, 7)])
def test_thin_images_are_cropped_before_they_are_enlarged(size: tuple[int, int]) -> None:
    crop = adm_crop(Image.new("RGB", size, (9, 9, 99)), 64)
    assert crop.shape == (64, 64, 3)
    assert (crop == (9, 9, 99)).all()


def test_the_crop_of_a_thin_image_is_the_middle_of_the_whole() -> None:
    # No value that the filter would clip between its two directions, whose order may depend on what is cut out.
    noise = np.random.default_rng(0).integers(64, 192, (300, 9, 3), dtype=np.uint8)
    for pixels in (noise, noise.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        scale = 64 / min(image.size)
        whole = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (whole.width - 64) // 2, (whole.height - 64) // 2
        expected = np.asarray(whole.crop((left, top, left + 64, top + 64))).astype(int)
        assert np.abs(adm_crop(image, 64) - expected).max() <= 2  # of rounding


def test_bombs_are_refused_by_name_and_reason() -> None:
    header = struct.pack(">4sII", b"IHDR", 13_000, 13_000) + b"\1\0\0\0\0"  # a bit for each pixel
    content = PICTURES[0][:12] + header + struct.pack(">I", zlib.crc32(header)) + PICTURES[0][33:]
    with pytest.raises(
        BrokenImageError, match=r"'it' cannot be decoded: 13,000 x 13,000 px are 169 megapixels, and a PNG"
    ):
        decode_image(content, "it")


def test_a_large_picture_is_converted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 21, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    whole = np.asarray(decode_image(buffer.getvalue(), "it"))
    monkeypatch.setattr("eqvae.images.modes._PIXELS_AT_A_TIME", 50)
    assert (np.asarray(decode_image(buffer.getvalue(), "it")) == whole).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "it is empty"), (b"<html>no", r"it is no JPEG, PNG, .* or AVIF \(it begins with b'<html>no'\)"),
     (PICTURES[0][:20], "Truncated File Read|its header is damaged"), (PICTURES[0][:-30], "truncated|broken")],
)  # fmt: skip
def test_the_reason_stands_beside_the_name(tmp_path: Path, content: bytes, reason: str) -> None:
    folder = files(tmp_path, *(f"{i:03}.png" for i in range(100)))
    (tmp_path / "050.png").write_bytes(content)
    batches = evaluation_batches(open_images(folder), image_size_px=8, batch_size=64, num_images=None, num_workers=0)
    ((name, why),) = [image for batch in batches for image in batch.broken]
    assert name == f"{tmp_path}/050.png"
    with pytest.raises(UserError, match=f"the first is '.*050.png' \\(.*({reason})"):
        raise UserError(f"the first is '{name}' ({why})")
    (tmp_path / "051.png").write_bytes(content)
    with pytest.raises(UserError, match=f"2 of 100 images .* the first is '.*050.png' \\(.*({reason})"):
        list(evaluation_batches(open_images(folder), image_size_px=8, batch_size=64, num_images=None, num_workers=0))


def test_small_images_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_images(files(tmp_path, *(f"{i}.png" for i in range(5))))
    for _ in range(2):
        list(evaluation_batches(source, image_size_px=32, batch_size=2, num_images=None, num_workers=0))
    line = f"'{tmp_path}/0.png' has 24 x 24 px: images smaller than 32 px are enlarged to them\n"
    assert capsys.readouterr().err == line


def test_names_for_the_terminal() -> None:
    assert printable("caf\udce9 \x1b[0m\n\ud800 ü 日本") == r"caf\xe9 \x1b[0m\n\ud800 ü 日本"


# ---- what nobody would notice


@pytest.mark.parametrize("damage", ["a byte", "two joined", "cut at a member"])
def test_an_archive_that_tarfile_would_read_in_part(tmp_path: Path, damage: str) -> None:
    path = Path(tar(tmp_path / "a.tar", [(f"{i}.png", PICTURES[i]) for i in range(6)]))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        starts = [member.offset for member in archive]
    changed = {
        "a byte": whole[: starts[3] + 150] + b"\xff" + whole[starts[3] + 151 :],
        "two joined": whole + whole,
        "cut at a member": whole[: starts[4]],
    }
    path.write_bytes(changed[damage])
    with pytest.raises(UserError, match=r"is truncated or no uncompressed tar archive \((it goes on|its end)"):
        open_images(str(path))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize(
    ("train", "test"),
    [("train/0", "val/0"), ("train-00000-of-00001", "test-00000-of-00001"), ("data/train-128", "data/test-128")],
)
def test_splits_of_tables_and_archives(tmp_path: Path, kind: str, train: str, test: str) -> None:
    for name, numbers in ((train, (0, 1, 2)), (test, (3, 4))):
        pictures = [PICTURES[number] for number in numbers]
        if kind == "tar":
            tar(tmp_path / f"{name}.tar", [(f"{i}.png", picture) for i, picture in enumerate(pictures)])
        else:
            parquet(tmp_path / f"{name}.parquet", image=cells(pictures))
    source = open_images(str(tmp_path))
    assert reds(source) == [0, 1, 2]
    assert re.search(r"1 of the split '(test|val)\*?'", source.describe())
    assert reds(open_images(str(tmp_path), split="evaluation")) == [3, 4]
    assert len(open_images(f"{tmp_path}/**/*.{kind}")) == 5  # a glob means what it says


def test_parts_of_one_table_are_no_splits(tmp_path: Path) -> None:
    for number in range(2):
        parquet(tmp_path / f"part-{number}.parquet", image=cells(PICTURES[number : number + 1]))
    assert reds(open_images(str(tmp_path))) == [0, 1]


def test_many_threads_read_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_MAX_KEPT_BYTES", 1)  # each read throws out another group
    pictures = [PICTURES[i % 12] for i in range(240)]
    source = open_images(parquet(tmp_path / "a.parquet", row_group_size=8, image=cells(pictures)))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            found = list(pool.map(source.content, range(240)))
            assert found == pictures
    assert pickle.loads(pickle.dumps(source)).content(100) == pictures[100]


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="the system does not list them")
def test_loaders_leave_no_open_files(tmp_path: Path) -> None:
    source = open_images(files(tmp_path, *(f"{i}.png" for i in range(4)), content=PICTURES[0]))

    def read_all() -> int:
        list(evaluation_batches(source, image_size_px=16, batch_size=2, num_images=None, num_workers=2))
        gc.collect()
        return len(list(DESCRIPTORS.iterdir()))

    read_all()
    before = read_all()
    for _ in range(6):
        after = read_all()
    assert after <= before + 4  # each round had left four; some are closed a moment later


def test_parts_of_one_split_are_one(tmp_path: Path) -> None:
    for number, name in enumerate(("train-0-000000", "train-0-000001", "train-1-000000", "train2017-1")):
        tar(tmp_path / f"{name}.tar", [(f"{number}.png", PICTURES[number])])
    assert reds(open_images(str(tmp_path))) == [0, 1, 2, 3]


def test_a_split_that_is_not_there_names_a_glob(tmp_path: Path) -> None:
    for number, name in enumerate(("validation-0", "test-0")):
        parquet(tmp_path / f"{name}.parquet", image=cells(PICTURES[number : number + 1]))
    with pytest.raises(UserError, match=r"has no split for train. Name one of: .*/test\*, .*/validation\*"):
        open_images(str(tmp_path))
    assert reds(open_images(f"{tmp_path}/test*")) == [1]
