"""Labels from folders, columns and archives; wrong ones are named, and only when somebody asks for them."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from eqvae.errors import UserError
from eqvae.images import ImageSource, encoding_batches, evaluation_batches, open_images


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


NO_PICTURE = "it is no JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, JPEG2000 or AVIF (it begins with b'broken')"


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())


def write_table(path: Path, feature: object = None, **columns: list) -> str:
    (name,) = columns
    features = {"image": datasets.Value("binary"), name: feature or datasets.Value("int64")}
    rows = {"image": [png()] * len(columns[name])} | columns
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def labels(source: ImageSource) -> list[int | None]:
    return [source.class_of(index) for index in range(len(source))]


# ---- folders


def test_folders_directly_under_data_are_classes(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/kittens/3.png", "owl/young/4.png"):
        write(tmp_path / name)
    source = open_images(str(tmp_path))
    assert source.class_names == ("cat", "dog", "owl")
    assert labels(source) == [0, 0, 1, 2]
    assert labels(open_images(f"{tmp_path}/*/*.png")) == [0, 1]
    assert labels(pickle.loads(pickle.dumps(source))) == [0, 0, 1, 2]
    assert open_images(str(tmp_path), label_column="none").class_names is None


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("1.png", "cat/2.png"), ("all/1.png", "all/2.png")])
def test_images_that_lie_flat_have_no_class(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name)
    source = open_images(str(tmp_path))
    assert source.class_names is None
    assert labels(source) == [None, None]


def test_photographs_have_no_class() -> None:
    assert open_images("photos").class_names is None


# ---- tables


def test_class_labels(tmp_path: Path) -> None:
    source = open_images(write_table(tmp_path / "x.parquet", datasets.ClassLabel(names=["b", "a"]), kind=[1, 0, 1]))
    assert source.class_names == ("b", "a")
    assert labels(source) == [1, 0, 1]


@pytest.mark.parametrize("name", ["label", "labels", "fine_label", "cls"])
def test_integers_keep_their_names(tmp_path: Path, name: str) -> None:
    source = open_images(write_table(tmp_path / "x.parquet", **{name: [3, 0]}))
    assert source.class_names == ("0", "3")  # those that occur
    assert labels(source) == [1, 0]


def test_strings_are_numbered_in_their_order(tmp_path: Path) -> None:
    data = write_table(tmp_path / "x.parquet", datasets.Value("string"), species=["owl", "cat", "owl"])
    assert open_images(data).class_names is None
    source = open_images(data, label_column="species")
    assert source.class_names == ("cat", "owl")
    assert labels(source) == [1, 0, 1]


def test_several_tables(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", label=[1])
    write_table(tmp_path / "b.parquet", label=[0, 2])
    assert labels(open_images(str(tmp_path))) == [1, 0, 2]


def test_a_table_without_labels(tmp_path: Path) -> None:
    assert open_images(write_table(tmp_path / "x.parquet", datasets.Value("float32"), label=[0.5])).class_names is None
    assert open_images(write_table(tmp_path / "y.parquet", label=[None, None])).class_names is None
    assert open_images(write_table(tmp_path / "z.parquet", label=[1]), label_column="none").class_names is None


def test_a_column_that_cannot_be_used(tmp_path: Path) -> None:
    data = write_table(tmp_path / "x.parquet", label=[1])
    with pytest.raises(UserError, match=r"has no column 'labels'\. Did you mean 'label'\?"):
        open_images(data, label_column="labels")
    with pytest.raises(UserError, match=r"--label-column 'image' .* neither integers nor strings\. Known: label"):
        open_images(data, label_column="image")
    write(tmp_path / "folder" / "a.png")
    with pytest.raises(UserError, match="is no table and has no columns"):
        open_images(str(tmp_path / "folder"), label_column="label")


@pytest.mark.parametrize(
    ("values", "what"),
    [([0, -1, -1], r"b\.parquet\[1\]' has label -1, out of range for 1000000 classes, and 1 more such row\."),
     ([0, 10**12, 1], r"b\.parquet\[1\]' has label 1000000000000, out of range"),
     ([0, 1, None], r"b\.parquet\[2\]' has no label\. Mend the data, or .*--label-column none")],
)  # fmt: skip
def test_wrong_labels_name_the_row(tmp_path: Path, values: list, what: str) -> None:
    write_table(tmp_path / "a.parquet", label=[0, 1])
    write_table(tmp_path / "b.parquet", label=values)
    source = open_images(str(tmp_path))
    assert source.read(2).size == (8, 8)  # who needs no labels is not stopped by them
    with pytest.raises(UserError, match=what):
        _ = source.class_names
    with pytest.raises(UserError, match=what):
        source.class_of(0)


def test_a_label_beyond_the_named_classes(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table(path, datasets.ClassLabel(names=["a", "b"]), label=[0, 1])
    source = open_images(str(path))
    source._labels = type(source._labels)(values=source._labels.values, names=("a",))
    with pytest.raises(UserError, match=r"x\.parquet\[1\]' has label 1, out of range for 1 classes"):
        source.class_of(0)


def test_cifar10(shared: Path) -> None:
    source = open_images(str(shared / "data" / "cifar10" / "test.parquet"))
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    assert [labels(source).count(label) for label in range(10)] == [1000] * 10


def test_the_imagenet_sample_lies_flat(shared: Path) -> None:
    source = open_images(str(shared / "data" / "imagenet-sample" / "train"))
    assert len(source) == 800
    assert source.class_names is None


# ---- archives


def test_class_members(tmp_path: Path) -> None:
    members = {"0.cls": b"2", "0.png": png(), "x/1.png": png(), "x/1.cls": b" 0\n", "2.png": png(), "2.cls": b"1"}
    source = open_images(write_tar(tmp_path / "x.tar", members))
    assert source.class_names == ("0", "1", "2")
    assert labels(source) == [2, 0, 1]
    assert open_images(source.name, label_column="none").class_names is None


def test_class_members_in_words(tmp_path: Path) -> None:
    members = {"0.png": png(), "0.cls": b"owl", "1.png": png(), "1.cls": b"cat"}
    source = open_images(write_tar(tmp_path / "x.tar", members))
    assert source.class_names == ("cat", "owl")
    assert labels(source) == [1, 0]


def test_a_missing_class_member(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": png(), "0.cls": b"1", "1.png": png()})
    with pytest.raises(UserError, match=r"x\.tar\[1\.png\]' has no label"):
        open_images(str(tmp_path)).class_of(0)


@pytest.mark.parametrize("text", [b"", b" \n"])
def test_an_empty_text_is_no_label(tmp_path: Path, text: bytes) -> None:
    source = open_images(
        write_tar(tmp_path / "x.tar", {"0.png": png(), "0.cls": b"owl", "1.png": png(), "1.cls": text})
    )
    with pytest.raises(UserError, match=r"x\.tar\[1\.png\]' has no label"):
        source.class_of(0)
    assert open_images(write_tar(tmp_path / "y.tar", {"0.png": png(), "0.cls": text})).class_names is None
    table = write_table(tmp_path / "x.parquet", datasets.Value("string"), label=["owl", text.decode()])
    with pytest.raises(UserError, match=r"x\.parquet\[1\]' has no label"):
        open_images(table).class_of(0)
    blank = write_table(tmp_path / "y.parquet", datasets.Value("string"), label=[text.decode()] * 2)
    assert open_images(blank).class_names is None


def test_a_class_member_is_not_cut_off(tmp_path: Path) -> None:
    members = {"0.png": png(), "0.cls": b"owl" * 100 + b"a", "1.png": png(), "1.cls": b"owl" * 100 + b"b"}
    source = open_images(write_tar(tmp_path / "x.tar", members))
    assert source.class_names is None
    assert "2 .cls of more than 256 bytes" in source.describe()


@pytest.mark.parametrize("prefix", ["", "train/", "./"])
def test_folders_of_members(tmp_path: Path, prefix: str) -> None:
    members = {f"{prefix}owl/0.png": png(), f"{prefix}cat/1.png": png(), f"{prefix}cat/young/2.png": png()}
    source = open_images(write_tar(tmp_path / "x.tar", members))
    assert source.class_names == ("cat", "owl")
    assert labels(source) == [1, 0, 0]


def test_members_that_lie_flat(tmp_path: Path) -> None:
    assert open_images(write_tar(tmp_path / "x.tar", {"0.png": png(), "1.png": png()})).class_names is None
    assert open_images(write_tar(tmp_path / "y.tar", {"all/0.png": png(), "all/1.png": png()})).class_names is None


# ---- the hub


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"img": [{"bytes": png(), "path": None}], "fine_label": [1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, *, split: table)
    source = open_images("hf:a/b:test")
    assert (source.class_names, source.class_of(0)) == (("b",), 0)
    assert len(source.fingerprint()) == 16
    former = hashlib.sha256(b"1\nb:test 1 0\n").hexdigest()[:16]  # as caches before 0.2.0's last day have it
    assert source.fingerprint_like(former) == former != source.fingerprint() == source.fingerprint_like("other")
    assert open_images("hf:a/c:test").fingerprint() != source.fingerprint()


# ---- fingerprints


def test_the_fingerprint_follows_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a" / "1.png")
    write(tmp_path / "one" / "b" / "2.png")
    first = open_images(str(tmp_path / "one")).fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert open_images(str(tmp_path / "two")).fingerprint() == first
    with (tmp_path / "two" / "a" / "1.png").open("ab") as file:
        file.write(b"x")
    longer = open_images(str(tmp_path / "two")).fingerprint()
    (tmp_path / "two" / "a" / "1.png").rename(tmp_path / "two" / "a" / "3.png")
    assert len({first, longer, open_images(str(tmp_path / "two")).fingerprint()}) == 3


def test_fingerprints_of_tables_and_archives(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name, data in (
        ("x.parquet", write_table(tmp_path / "x.parquet", label=[1])),
        ("x.tar", write_tar(tmp_path / "x.tar", {"0.png": png()})),
    ):
        first = open_images(data).fingerprint()
        Path(data).rename(tmp_path / "moved" / name)
        assert open_images(str(tmp_path / "moved" / name)).fingerprint() == first
    assert open_images(write_table(tmp_path / "y.parquet", label=[1, 1])).fingerprint() != first


# ---- batches for encoding


@pytest.mark.parametrize("num_workers", [0, 1])
def test_encoding_batches_are_the_evaluation_crops_of_their_ranges(tmp_path: Path, num_workers: int) -> None:
    for index in range(5):
        Image.new("RGB", (20, 16 + index), (index, 9, 9)).save(tmp_path / f"{index}.png")
    source = open_images(str(tmp_path))
    parts = [range(3, 5), range(0), range(2)]
    batches = list(encoding_batches(source, image_size_px=8, parts=parts, num_workers=num_workers))
    assert [batch.indices for batch in batches] == [(3, 4), (), (0, 1)]
    assert [tuple(batch.crops.shape) for batch in batches] == [(2, 8, 8, 3), (0, 8, 8, 3), (2, 8, 8, 3)]
    (whole,) = evaluation_batches(source, image_size_px=8, batch_size=5, num_images=None, num_workers=0)
    crops = batches[0].crops.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    assert crops.equal(whole.images[3:5])


def test_broken_images_of_earlier_ranges_count(tmp_path: Path) -> None:
    for index in range(100):
        write(tmp_path / f"{index:02}.png")
    (tmp_path / "50.png").write_bytes(b"broken")
    source = open_images(str(tmp_path))
    (batch,) = encoding_batches(source, image_size_px=8, parts=[range(49, 52)], num_workers=0)
    assert (batch.indices, batch.broken) == ((49, 51), ((str(tmp_path / "50.png"), NO_PICTURE),))
    with pytest.raises(UserError, match=r"2 of 100 images .* are broken so far"):
        list(encoding_batches(source, image_size_px=8, parts=[range(49, 52)], num_broken=1, num_workers=0))
