"""Every kind of DATA opens, and what cannot be opened is refused in one line with its mend."""

import io
import pickle
import tarfile
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import HfFileSystem
from PIL import Image

from eqvae.errors import UserError
from eqvae.images import BrokenImageError, ImageSource, open_images

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(colour: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def colours(source: ImageSource) -> list[tuple[int, ...]]:
    images = [source.read(index) for index in range(len(source))]
    assert all(image.mode == "RGB" and image.size == (5, 3) for image in images)
    return [image.getpixel((0, 0)) for image in images]


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_parquet(path: Path, rows: dict[str, list], features: datasets.Features | None = None) -> None:
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


# ---- photographs


def test_photographs_are_coloured_and_in_one_set_only() -> None:
    sets = [open_images("photos", split=split) for split in ("train", "evaluation")]
    names = [[Path(source.label(index)).stem for index in range(len(source))] for source in sets]
    assert [len(each) for each in names] == [6, 3]
    assert not set(names[0]) & set(names[1])
    assert {"motorcycle_left", "motorcycle_right"} <= set(names[0])
    for source in sets:
        for index in range(len(source)):
            image = source.read(index)
            assert min(image.size) >= 256
            red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
            assert np.abs(red - green).mean() + np.abs(green - blue).mean() > 5, source.label(index)


# ---- folders


def test_folder_is_recursive_sorted_and_leaves_out_hidden_and_other_files(tmp_path: Path) -> None:
    write(tmp_path / "b" / "1.PNG", png(COLOURS[1]))
    write(tmp_path / "a" / "deep" / "2.png", png(COLOURS[0]))
    write(tmp_path / "c.png", png(COLOURS[2]))
    write(tmp_path / ".hidden.png", png(COLOURS[3]))
    write(tmp_path / ".thumbnails" / "x.png", png(COLOURS[3]))
    write(tmp_path / "labels.csv", b"1,2")
    source = open_images(str(tmp_path))
    assert source.name == str(tmp_path)
    assert colours(source) == list(COLOURS[:3])
    assert source.label(1) == str(tmp_path / "b" / "1.PNG")


def test_folder_is_listed_anew_each_time(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(COLOURS[0]))
    assert len(open_images(str(tmp_path))) == 1
    write(tmp_path / "b.png", png(COLOURS[1]))
    assert len(open_images(str(tmp_path))) == 2


def test_folder_follows_links_and_odd_names(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.png", png(COLOURS[0]))
    folder = tmp_path / "set [1]*"
    folder.mkdir()
    (folder / "class").symlink_to(tmp_path / "real")
    assert colours(open_images(str(folder))) == [COLOURS[0]]


def test_single_file_and_glob(tmp_path: Path) -> None:
    for index in range(3):
        write(tmp_path / f"{index}.png", png(COLOURS[index]))
    assert colours(open_images(str(tmp_path / "1.png"))) == [COLOURS[1]]
    assert colours(open_images(str(tmp_path / "[02].png"))) == [COLOURS[0], COLOURS[2]]


def test_a_glob_passes_over_nothing_without_a_word(tmp_path: Path) -> None:
    for index, name in enumerate(("cat/a.png", "dog/b.png", "cover.png")):
        write(tmp_path / name, png(COLOURS[index]))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    source = open_images(str(tmp_path / "*"))
    assert colours(source) == [COLOURS[0], COLOURS[2], COLOURS[1]], "folders beside a file count too"
    assert "1 of the images lies beside the class folders" in source.describe()
    assert "1 left out (1 links to nothing)" in source.describe()


@pytest.mark.parametrize("data", ["", "*", "**/*.png"])
def test_a_run_inside_the_data_is_no_data(tmp_path: Path, data: str) -> None:
    write(tmp_path / "data" / "a.png", png(COLOURS[0]))
    run = tmp_path / "data" / "runs" / "eq"
    write(run / "validation" / "step.png", png(COLOURS[1]))
    write(run / "config.json", b'{"command": "finetune"}')
    write(run / "environment.json", b"{}")
    source = open_images(str(tmp_path / "data" / data))
    assert colours(source) == [COLOURS[0]]
    assert "1 folders of eqvae's runs" in source.describe()
    assert colours(open_images(str(run))) == [COLOURS[1]], "what is named itself is read"


def test_folder_of_text_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        write(tmp_path / name, b"text")
    with pytest.raises(UserError, match=r"holds no image \(2 other files\)\. Images end in .*\.png"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("place", ["", "list.csv"])
def test_a_list_of_names_by_mistake(tmp_path: Path, place: str) -> None:
    write(tmp_path / "list.csv", b"name,label\na.jpg,1\n")
    with pytest.raises(UserError, match=r"no image but \.csv, and a list of names is not read\. Give the folder"):
        open_images(str(tmp_path / place))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no image \(0 other files\)"):
        open_images(str(tmp_path))


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nowhere' does not exist\. Check the path; data is one of: photos, an image folder"
    ):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"'photo' does not exist\. Did you mean 'photos'\?"):
        open_images("photo")
    with pytest.raises(UserError, match=r"does not exist\. Check the path"):
        open_images(str(tmp_path / "*.parquet"))


def test_broken_image_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(COLOURS[0])[:40])
    source = open_images(str(tmp_path))
    with pytest.raises(BrokenImageError, match=r"a\.png' cannot be decoded"):
        source.read(0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BrokenImageError, match=r"a\.png' cannot be decoded"):
        source.read(0)


# ---- parquet


@pytest.mark.parametrize("kind", ["struct", "binary", "image"])
def test_parquet_image_column_is_found_by_content(tmp_path: Path, kind: str) -> None:
    contents = [png(colour) for colour in COLOURS[:2]]
    structs = [{"bytes": content, "path": "x.png"} for content in contents]
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    feature = {"struct": struct, "binary": datasets.Value("binary"), "image": datasets.Image()}[kind]
    write_parquet(
        tmp_path / "x.parquet",
        {"label": [1, 2], "image": [b"no", b"image"], "pixels": contents if kind == "binary" else structs},
        datasets.Features({"label": datasets.Value("int64"), "image": datasets.Value("binary"), "pixels": feature}),
    )
    source = open_images(str(tmp_path / "x.parquet"))
    assert colours(source) == list(COLOURS[:2])
    assert source.label(1) == f"{tmp_path / 'x.parquet'}[1]"


@pytest.mark.parametrize("data", ["", "*.parquet"])
def test_parquet_folder_and_glob_label_the_row_of_the_file(tmp_path: Path, data: str) -> None:
    folder = tmp_path / "data [1]"
    folder.mkdir()
    write_parquet(folder / "b.parquet", {"image": [png(COLOURS[2])]})
    write_parquet(folder / "a.parquet", {"image": [png(COLOURS[0]), png(COLOURS[1])]})
    source = open_images(str(folder) if not data else f"{tmp_path}/data*/{data}")
    assert colours(source) == list(COLOURS[:3])
    assert [source.label(index) for index in range(3)] == [
        f"{folder}/{name}" for name in ("a.parquet[0]", "a.parquet[1]", "b.parquet[0]")
    ]


def test_parquet_that_was_rewritten_is_read_anew(tmp_path: Path) -> None:
    for colour in COLOURS[:2]:
        write_parquet(tmp_path / "x.parquet", {"image": [png(colour)]})
        assert colours(open_images(str(tmp_path / "x.parquet"))) == [colour]


def test_parquet_rows_that_are_broken_or_empty(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"image": [None, b"broken", png(COLOURS[0])]})
    source = open_images(str(tmp_path / "x.parquet"))
    with pytest.raises(
        BrokenImageError, match=r"x\.parquet\[0\]' cannot be decoded: it cannot be read \(the cell is empty\)"
    ):
        source.read(0)
    with pytest.raises(BrokenImageError, match=r"x\.parquet\[1\]' cannot be decoded"):
        source.read(1)
    assert source.read(2).getpixel((0, 0)) == COLOURS[0]


@pytest.mark.parametrize("empty", [None, b""])
def test_parquet_that_begins_with_empty_cells(tmp_path: Path, empty: bytes | None) -> None:
    write_parquet(tmp_path / "x.parquet", {"image": [empty] * 20 + [png(COLOURS[0])]})
    source = open_images(str(tmp_path / "x.parquet"))
    assert source.read(20).getpixel((0, 0)) == COLOURS[0]
    with pytest.raises(BrokenImageError, match="the cell is empty"):
        source.read(0)


def test_parquet_of_paths(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.png", png(COLOURS[3]))
    write_parquet(tmp_path / "x.parquet", {"image": [{"bytes": None, "path": str(tmp_path / "images" / "a.png")}]})
    assert colours(open_images(str(tmp_path / "x.parquet"))) == [COLOURS[3]]


def test_parquet_without_an_image_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"label": [1], "text": ["a"], "blob": [b"no image"]})
    with pytest.raises(UserError, match=r"x\.parquet' has no image column \(columns: label, text, blob\)"):
        open_images(str(tmp_path / "x.parquet"))


def test_parquet_without_rows(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Value("binary")})
    write_parquet(tmp_path / "x.parquet", {"image": []}, features)
    with pytest.raises(UserError, match="has no rows"):
        open_images(str(tmp_path / "x.parquet"))
    write_parquet(tmp_path / "y.parquet", {"image": [png(COLOURS[0])]})
    source = open_images(str(tmp_path))
    assert colours(source) == [COLOURS[0]]
    assert source.label(0) == f"{tmp_path / 'y.parquet'}[0]"


def test_parquet_that_is_truncated(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [png(COLOURS[0])]})
    write(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b\.parquet' is truncated or no parquet file"):
        open_images(str(tmp_path))


def test_parquet_that_is_damaged_inside(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", b"PAR1 nothing of the kind PAR1")
    with pytest.raises(UserError, match=r"a\.parquet' cannot be read as parquet") as caught:
        open_images(str(tmp_path / "a.parquet"))
    assert "\n" not in str(caught.value)


def test_parquet_files_of_different_schemas(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": [png(COLOURS[0])]})
    write_parquet(tmp_path / "b.parquet", {"text": ["a"], "image": [1]})
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_images(str(tmp_path))


# ---- tar shards


def test_tar_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", {"x/7.png": png(COLOURS[2]), "x/7.cls": b"3"})
    members = {"0.cls": b"1", "0.png": png(COLOURS[0]), "0.mask.png": png(COLOURS[3]), "._1.png": b"", "1.png": b""}
    write_tar(tmp_path / "0.tar", {**members, "1.png": png(COLOURS[1])})
    for data in (tmp_path, tmp_path / "*.tar"):
        source = open_images(str(data))
        assert colours(source) == list(COLOURS[:3])
        assert source.label(0) == f"{tmp_path / '0.tar'}[0.png]"
        assert source.label(2) == f"{tmp_path / '1.tar'}[x/7.png]"
    assert len(open_images(str(tmp_path / "1.tar"))) == 1


def test_tar_without_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.txt": b"text"})
    with pytest.raises(UserError, match="holds no image in 1 tar archive"):
        open_images(str(tmp_path / "0.tar"))


def test_tar_that_is_none_or_truncated(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", b"no archive" * 100)
    with pytest.raises(UserError, match=r"0\.tar' is truncated or no uncompressed tar archive"):
        open_images(str(tmp_path))
    write_tar(tmp_path / "0.tar", {"0.png": png(COLOURS[0]), "1.png": bytes(5000)})
    write(tmp_path / "0.tar", (tmp_path / "0.tar").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"0\.tar' is truncated"):
        open_images(str(tmp_path))


# ---- the hub


def test_hub_without_network_names_the_offline_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # both read the variable at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for data in ("hf:eqvae/no-such-data", "hf:eqvae/no-such-data:test"):
        with pytest.raises(UserError, match=r"hub cannot be reached.*Without network, use `photos`, an image folder"):
            open_images(data)


@pytest.mark.parametrize("data", ["hf:", "hf:/", "hf::train", "hf:..", "hf:/etc/x", "hf:a b"])
def test_what_names_nothing_on_the_hub(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: pytest.fail("nothing is to be opened"))
    with pytest.raises(UserError, match=f"'{data}' names no data set of the hub. DATA is hf:NAME"):
        open_images(data)


@pytest.mark.parametrize(
    ("data", "split", "configuration", "chosen"),
    [
        ("hf:a/b", "train", None, "train"),
        ("hf:a/b", "evaluation", None, "validation"),
        ("hf:cifar10", "train", None, "train"),
        ("hf:a/b:test", "train", None, "test"),
        ("hf:a/b/320px:test", "train", "320px", "test"),
    ],
)
def test_hub_splits(
    monkeypatch: pytest.MonkeyPatch, data: str, split: str, configuration: str | None, chosen: str
) -> None:
    opened = []

    def load(name: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        opened.append((name, configuration, split))
        return datasets.Dataset.from_dict({"image": [png(COLOURS[0])]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda name, configuration: ["test", "train", "validation"]
    )
    source = open_images(data, split=split)
    assert opened == [("cifar10" if "cifar10" in data else "a/b", configuration, chosen)]
    assert colours(source) == [COLOURS[0]]
    assert source.label(0) == f"{data.removesuffix(f':{chosen}')}:{chosen}[0]"


def test_a_data_set_that_is_a_program_is_read_from_the_hubs_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    def load(kind: str, *arguments: object, data_files: dict[str, list[str]] | None = None, split: str):
        if kind != "parquet":
            refuse()
        opened.append((data_files, split))
        return datasets.Dataset.from_dict({"image": [png(COLOURS[0])]})

    def list_folder(self: HfFileSystem, folder: str, detail: bool) -> list[dict[str, str]]:
        names = {"a/b": ("160px", "320px"), "a/b/320px": ("train", "validation")}
        found = names[folder.removeprefix("datasets/").replace("@refs/convert/parquet", "")]
        return [{"name": f"{folder}/{name}", "type": "directory"} for name in found]

    def find_parts(self: HfFileSystem, pattern: str) -> list[str]:
        return [pattern.replace("*", "0001"), pattern.replace("*", "0000")]

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(HfFileSystem, "ls", list_folder)
    monkeypatch.setattr(HfFileSystem, "glob", find_parts)
    source = open_images("hf:a/b/320px", split="evaluation")
    folder = "hf://datasets/a/b@refs/convert/parquet/320px/validation"
    assert opened == [({"validation": [f"{folder}/0000.parquet", f"{folder}/0001.parquet"]}, "validation")]
    assert source.label(0) == "hf:a/b/320px:validation[0]"
    with pytest.raises(UserError, match=r"several configurations\. Name one of: hf:a/b/160px, hf:a/b/320px"):
        open_images("hf:a/b")


def test_hub_without_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, configuration: ["train", "extra"])
    with pytest.raises(UserError, match=r"no split for evaluation\. Name one of: hf:a/b:train, hf:a/b:extra"):
        open_images("hf:a/b", split="evaluation")


# ---- all


def test_sources_pickle(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(COLOURS[0]))
    write_parquet(tmp_path / "x.parquet", {"image": [png(COLOURS[1])]})
    write_tar(tmp_path / "x.tar", {"a.png": png(COLOURS[2])})
    for data, colour in zip(("a.png", "x.parquet", "x.tar"), COLOURS, strict=False):
        assert colours(pickle.loads(pickle.dumps(open_images(str(tmp_path / data))))) == [colour]
