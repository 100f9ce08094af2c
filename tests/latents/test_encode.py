"""Encoding: what is written, resumption, broken images and shards, full disks, killed writers."""

import errno
import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from eqvae.artifacts.files import read_journal, read_json
from eqvae.errors import Interrupted, UserError
from eqvae.latents.cache import LatentCache
from eqvae.latents.index import INDEX
from eqvae.runs import encode_run as encode_module
from eqvae.runs.encode import EncodeConfig, encode

Configure = Callable[..., EncodeConfig]
SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*SHARDS, INDEX)}


def kinds(folder: Path) -> list[str]:
    return [record["kind"] for record in read_journal(folder)]


@pytest.fixture
def whole(config_for: Configure, tmp_path: Path, small_autoencoder) -> dict[str, bytes]:
    """The files of an encoding that nothing disturbed."""
    encode(config_for(tmp_path / "whole"), small_autoencoder)
    return contents(tmp_path / "whole")


# What is written ----------------------------------------------------------------------------------------------------


def test_the_folder(config_for: Configure, tmp_path: Path, small_autoencoder):
    out = tmp_path / "out"
    figures = encode(config_for(out), small_autoencoder)
    assert {path.name for path in out.iterdir()} == {
        *SHARDS, INDEX, "config.json", "environment.json", "journal.jsonl", "metrics.json"
    }  # fmt: skip
    assert figures == read_json(out / "metrics.json")
    assert figures["num_images"] == 10
    assert figures["num_broken"] == 0
    assert figures["num_bytes"] == sum((out / name).stat().st_size for name in SHARDS)
    assert figures["images_per_sec"] > 0
    index = LatentCache.open(out).index
    assert [figures[f"latent_std_{channel}"] for channel in range(4)] == list(index.statistics.std)
    assert (index.image_size_px, index.stride, index.latent_channels, index.latent_height) == (16, 4, 4, 4)
    assert [(entry.first, entry.count) for entry in index.shards] == [(0, 4), (4, 4), (8, 2)]
    config = read_json(out / "config.json")
    assert config["command"] == "encode"
    assert config["fingerprint"] == index.fingerprint == small_autoencoder.fingerprint()
    assert kinds(out) == ["data", *["shard"] * 3]


def test_the_batch_size_changes_no_image(make_cache: Callable[..., LatentCache]):
    latents = [make_cache(f"{size}", batch_size=size).read(torch.arange(10)).latents for size in (1, 4)]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)


def test_bf16_is_near_fp32(make_cache: Callable[..., LatentCache]):
    full, half = make_cache("full"), make_cache("half", precision="bf16")
    z = [cache.normalization.denormalize(cache.read(torch.arange(10)).latents) for cache in (full, half)]
    assert 0 < (z[0] - z[1]).square().mean().sqrt() < 0.02 * z[0].std()


def test_some_images_only(make_cache: Callable[..., LatentCache]):
    cache = make_cache(num_images=5)
    assert cache.source_indices().tolist() == list(range(5))
    assert [entry.count for entry in cache.index.shards] == [4, 1]


def test_workers_change_nothing(config_for: Configure, tmp_path: Path, small_autoencoder, whole: dict[str, bytes]):
    encode(config_for(tmp_path / "out", num_workers=2), small_autoencoder)
    assert contents(tmp_path / "out") == whole


# Going on -----------------------------------------------------------------------------------------------------------


def test_a_finished_cache_is_left_alone(config_for: Configure, tmp_path: Path, small_autoencoder, monkeypatch):
    config = config_for(tmp_path / "out")
    first = encode(config, small_autoencoder)
    before, times = contents(config.out), [(config.out / name).stat().st_mtime_ns for name in SHARDS]
    monkeypatch.setattr(encode_module, "encode_crops", None)
    assert encode(config, small_autoencoder) == first
    assert contents(config.out) == before
    assert [(config.out / name).stat().st_mtime_ns for name in SHARDS] == times


@pytest.mark.parametrize("fault", ["missing", "truncated", "flipped bit", "empty"])
def test_only_a_broken_shard_is_rebuilt(
    config_for: Configure, tmp_path: Path, small_autoencoder, whole: dict[str, bytes], fault: str
):
    config = config_for(tmp_path / "whole")
    path = config.out / SHARDS[1]
    damaged = bytearray(whole[SHARDS[1]])
    damaged[-50] ^= 4
    path.write_bytes({"truncated": whole[SHARDS[1]][:-9], "flipped bit": bytes(damaged)}.get(fault, b""))
    if fault == "missing":
        path.unlink()
    times = [(config.out / name).stat().st_mtime_ns for name in (SHARDS[0], SHARDS[2])]
    encode(config, small_autoencoder)
    assert contents(config.out) == whole
    assert [(config.out / name).stat().st_mtime_ns for name in (SHARDS[0], SHARDS[2])] == times
    LatentCache.open(config.out).verify()
    records = read_journal(config.out)[3:]
    assert {"kind": "shard", "file": SHARDS[1], "num_images": 4} in records
    assert ({"kind": "broken_shard", "file": SHARDS[1]} in records) == (fault != "missing")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_resumably(
    config_for: Configure, tmp_path: Path, small_autoencoder, whole: dict[str, bytes], monkeypatch, number
):
    config, calls = config_for(tmp_path / "out"), []
    plain = encode_module.encode_crops

    def interrupted(*arguments: object) -> dict:
        calls.append(1)
        if len(calls) == 4:  # of 5 batches: the second of the second shard
            os.kill(os.getpid(), number)
        return plain(*arguments)

    monkeypatch.setattr(encode_module, "encode_crops", interrupted)
    with pytest.raises(Interrupted, match=f"{signal.Signals(number).name}; the same command goes on"):
        encode(config, small_autoencoder)
    assert sorted(path.name for path in config.out.glob("*.safetensors")) == [SHARDS[0]]
    assert not (config.out / INDEX).exists()
    encode(config, small_autoencoder)
    assert contents(config.out) == whole
    assert len(calls) == 4 + 3


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest, torch
from eqvae.runs import encode as encoding
sys.path.insert(0, sys.argv[1])
import conftest
write, calls = Path.write_bytes, []
def die_half_way(path, content):
    calls.append(path)
    if len(calls) == 2:
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)
Path.write_bytes = die_half_way
torch.set_num_threads(1)
encoding.encode(encoding.EncodeConfig(
    autoencoder="small", data=sys.argv[2], out=Path(sys.argv[3]), image_size=16, batch_size=3, shard_size=4,
    precision="fp32", dtype="float32", device="cpu", num_workers=0), conftest.SmallAutoencoder())
"""


def test_a_killed_writer_leaves_no_half_shard(
    config_for: Configure, data: Path, tmp_path: Path, small_autoencoder, whole: dict[str, bytes]
):
    config = config_for(tmp_path / "out")
    script = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(data), str(config.out)]
    assert subprocess.run(script, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in config.out.glob("*.safetensors")] == [SHARDS[0]]
    assert (config.out / SHARDS[0]).read_bytes() == whole[SHARDS[0]]
    assert len(list(config.out.glob(".*.part"))) == 1
    before = (config.out / SHARDS[0]).stat().st_mtime_ns
    encode(config, small_autoencoder)
    assert contents(config.out) == whole
    assert (config.out / SHARDS[0]).stat().st_mtime_ns == before
    assert not list(config.out.glob(".*"))


# Full disks ---------------------------------------------------------------------------------------------------------


def test_an_error_of_the_disk_is_one_line_and_loses_nothing(
    config_for: Configure, tmp_path: Path, small_autoencoder, whole: dict[str, bytes], monkeypatch
):
    config, write = config_for(tmp_path / "out"), Path.write_bytes

    def fill(path: Path, content: bytes) -> int:
        if SHARDS[1] in path.name:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        with pytest.raises(UserError, match=rf"{SHARDS[1]}' can't be written \(No space left on device\)\. Whole"):
            encode(config, small_autoencoder)
    assert {path.name for path in config.out.iterdir()} == {
        SHARDS[0], "config.json", "environment.json", "journal.jsonl"
    }  # fmt: skip
    encode(config, small_autoencoder)
    assert contents(config.out) == whole


def test_a_full_disk(config_for: Configure, tmp_path: Path, small_autoencoder, whole: dict[str, bytes]):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        config = config_for(disk / "out")
        with pytest.raises(UserError, match=r"can't be written \(No space left on device\)"):
            encode(config, small_autoencoder)
        left = [path.name for path in config.out.glob("*.safetensors")]
        assert left
        assert set(left) < set(SHARDS)
        assert all((config.out / name).read_bytes() == whole[name] for name in left)
        assert not list(config.out.glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        encode(config, small_autoencoder)
        assert contents(config.out) == whole
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [({"image_size": 20}, "--image-size 16, not 20"), ({"dtype": "float16"}, "--dtype float32, not float16"),
     ({"mirror": False}, "--mirror True, not False"), ({"shard_size": 5}, "--shard-size 4, not 5"),
     ({"num_images": 4}, "--num-images None, not 4"), ({"precision": "bf16"}, "--precision fp32, not bf16"),
     ({"label_column": "none"}, "--label-column None, not none")],
)  # fmt: skip
def test_another_cache_in_the_same_folder(
    config_for: Configure, tmp_path: Path, small_autoencoder, whole, change, what
):
    before = contents(tmp_path / "whole")
    with pytest.raises(UserError, match=f"holds a latent cache with {what}"):
        encode(config_for(tmp_path / "whole", **change), small_autoencoder)
    assert contents(tmp_path / "whole") == before


def test_another_autoencoder_or_data(config_for: Configure, tmp_path: Path, data: Path, small_autoencoder, whole):
    other = type(small_autoencoder)(seed=1)
    with pytest.raises(UserError, match="a latent cache of autoencoder 'small', which has changed since"):
        encode(config_for(tmp_path / "whole"), other)
    with pytest.raises(UserError, match="a latent cache of autoencoder 'small', not 'other'"):
        encode(config_for(tmp_path / "whole", autoencoder="other"), other)
    (data / "a" / "000.png").unlink()
    with pytest.raises(UserError, match="a latent cache of data '.*', which has changed since"):
        encode(config_for(tmp_path / "whole"), small_autoencoder)


def test_a_longer_cache_keeps_whole_shards(config_for: Configure, tmp_path: Path, small_autoencoder, whole):
    config = config_for(tmp_path / "out", num_images=6)
    encode(config, small_autoencoder)
    before = (config.out / SHARDS[0]).stat().st_mtime_ns
    encode(config_for(tmp_path / "out", num_images=10), small_autoencoder)
    assert {name: (config.out / name).read_bytes() for name in SHARDS} == {name: whole[name] for name in SHARDS}
    assert (config.out / SHARDS[0]).stat().st_mtime_ns == before
    assert LatentCache.open(config.out).index.num_images == 10


def test_mended_labels_are_written_into_kept_shards(config_for: Configure, tmp_path: Path, small_autoencoder):
    members = [(f"{i}.{kind}", i) for i in range(6) for kind in ("png", "cls")]

    def write(classes: str) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name, number in members:
                content = classes[number].encode()
                if name.endswith("png"):
                    Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(buffer := io.BytesIO(), "PNG")
                    content = buffer.getvalue()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    write("ababab")
    config = config_for(tmp_path / "out", data=str(tmp_path / "a.tar"))
    encode(config, small_autoencoder)
    for name in (INDEX, "metrics.json", SHARDS[1]):  # as if it had been interrupted
        (config.out / name).unlink()
    write("bababa")
    encode(config, small_autoencoder)
    assert LatentCache.open(config.out).labels().tolist() == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("num_whole", [0, 2])
def test_refused_and_then_run_as_advised(
    config_for: Configure, tmp_path: Path, write_images, small_autoencoder, capsys, num_whole: int
):
    data = write_images(tmp_path / "few", broken=(9,) if num_whole else (0,))
    config = config_for(tmp_path / "out", data=str(data))
    with pytest.raises(UserError, match="broken so far"):
        encode(config, small_autoencoder)
    (broken,) = [path for path in data.rglob("*.png") if path.read_bytes() == b"broken"]
    broken.unlink()
    encode(config, small_autoencoder)
    assert LatentCache.open(config.out).index.num_images == 9
    LatentCache.open(config.out).verify()
    assert ("has changed since: the shards" in capsys.readouterr().err) == (num_whole > 0)


def test_shards_that_vanish_are_made_again(
    config_for: Configure, tmp_path: Path, small_autoencoder, whole, monkeypatch
):
    config, plain = config_for(tmp_path / "out"), encode_module.finish_shard

    def vanish(folder: Path, recipe, number: int, *arguments, **options) -> Path:
        path = plain(folder, recipe, number, *arguments, **options)
        if number == 2:
            (folder / SHARDS[0]).unlink(missing_ok=True)
        return path

    monkeypatch.setattr(encode_module, "finish_shard", vanish)
    encode(config, small_autoencoder)
    assert contents(config.out) == whole
    assert {"kind": "vanished_shard", "file": SHARDS[0]} in read_journal(config.out)


def test_shards_that_vanish_for_ever_end_the_encoding(
    config_for: Configure, tmp_path: Path, small_autoencoder, monkeypatch
):
    plain = encode_module.finish_shard

    def vanish(*arguments, **options) -> Path:
        path = plain(*arguments, **options)
        path.unlink()
        return path

    monkeypatch.setattr(encode_module, "finish_shard", vanish)
    with pytest.raises(UserError, match="Shards vanish"):
        encode(config_for(tmp_path / "out"), small_autoencoder)


def test_moved_data_are_the_same_data(config_for: Configure, tmp_path: Path, data: Path, small_autoencoder, whole):
    data.rename(tmp_path / "moved")
    (tmp_path / "whole" / SHARDS[2]).unlink()
    encode(config_for(tmp_path / "whole", data=str(tmp_path / "moved")), small_autoencoder)
    assert (tmp_path / "whole" / SHARDS[2]).read_bytes() == whole[SHARDS[2]]


@pytest.mark.parametrize(
    ("change", "what"),
    [({"image_size": 18}, "not divisible by the stride 4. Use 16 or 20"), ({"batch_size": 0}, "--batch-size is 0"),
     ({"num_images": 11}, "--num-images 11 asks for more than the 10"), ({"num_workers": -1}, "--num-workers is -1"),
     ({"label_column": "label"}, "is no table and has no columns")],
)  # fmt: skip
def test_values_that_make_no_sense(config_for: Configure, tmp_path: Path, small_autoencoder, change, what):
    with pytest.raises(UserError, match=what):
        encode(config_for(tmp_path / "out", **change), small_autoencoder)
    assert not (tmp_path / "out").exists()


def test_latents_that_float16_cannot_hold(config_for: Configure, tmp_path: Path, small_autoencoder):
    with torch.no_grad():
        small_autoencoder.encoder[2].bias[0] = 1e5
    with pytest.raises(UserError, match=r"reach 1e\+05 \(mean\), which float16 can't hold\. Use --dtype bfloat16"):
        encode(config_for(tmp_path / "out", dtype="float16"), small_autoencoder)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    encode(config_for(tmp_path / "wide", dtype="bfloat16"), small_autoencoder)


def test_latents_that_are_not_finite(config_for: Configure, tmp_path: Path, small_autoencoder):
    with torch.no_grad():
        small_autoencoder.encoder[0].weight[0] = float("nan")
    with pytest.raises(UserError, match="hold NaN or infinite values"):
        encode(config_for(tmp_path / "out"), small_autoencoder)


# Broken images ------------------------------------------------------------------------------------------------------


def test_broken_images_are_left_out_and_named(config_for: Configure, tmp_path: Path, write_images, small_autoencoder):
    data = write_images(tmp_path / "many", num_images=100, broken=(7,))
    config = config_for(tmp_path / "out", data=str(data), shard_size=1, batch_size=8)
    figures = encode(config, small_autoencoder)
    assert (figures["num_images"], figures["num_broken"]) == (99, 1)
    cache = LatentCache.open(config.out)
    cache.verify()
    assert cache.source_indices().tolist() == [index for index in range(100) if index != 53]  # in the paths' order
    assert [entry.count for entry in cache.index.shards] == [1] * 53 + [0] + [1] * 46
    named = [record["name"] for record in read_journal(config.out) if record["kind"] == "broken_image"]
    assert named == [str(data / "b" / "007.png")]
    cache.read(torch.arange(99), mirrored=torch.ones(99, dtype=torch.bool), noise=torch.randn(99, 4, 4, 4))
    assert cache.labels().tolist() == [0] * 50 + [1] * 49


def test_too_many_broken_images(config_for: Configure, tmp_path: Path, write_images, small_autoencoder):
    data = write_images(tmp_path / "few", broken=(9,))
    with pytest.raises(UserError, match=r"1 of 10 images .* are broken so far.*009\.png"):
        encode(config_for(tmp_path / "out", data=str(data)), small_autoencoder)
    assert not (tmp_path / "out" / INDEX).exists()
