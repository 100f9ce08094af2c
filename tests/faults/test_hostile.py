"""Damaged and hostile files of weights, samples, records and configurations: the right result, or one line.

A few of each kind run with all tests; at least 10,000 in `make faults`.
"""

import io
import json
import os
import pickle
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eqvae.artifacts.files import read_json, write_json
from eqvae.artifacts.records import Pictures
from eqvae.artifacts.sample_sets import write_sample_set
from eqvae.artifacts.typed import to_type
from eqvae.autoencoders import load_autoencoder
from eqvae.autoencoders.families import KLAutoencoder
from eqvae.cli import run
from eqvae.drawing.folders import read_folders
from eqvae.errors import UserError
from eqvae.evidence.curves import read_curve
from eqvae.generators.checkpoints import GeneratorCard, read_card, read_generator, write_generator
from eqvae.generators.families import find_recipe
from eqvae.generators.official import read_official
from eqvae.generators.protocol import LatentSpecification
from eqvae.images.image_sets import open_samples
from eqvae.latents.index import read_index
from eqvae.metrics.statistics import with_adm_moments

CARD = "generator.json"
CASES = Path(__file__).resolve().parents[2] / ".." / "shared" / "cases" / "hostile"
MOST_SEC, MOST_BYTES = 20.0, 2**30

Case = tuple[Callable[[Path], Any], Callable[[Path], Path]]
"""What reads a file or folder, and what writes a good one below a folder and names the file to damage."""

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 1.5, 10**9, 10**18, 10**400, -(2**70), 1e308, -1e308, 1e-320, float("nan"),
    float("inf"), "", "x", "\x00", "../../etc/passwd", "café", [], [[]], {}, {"a": {}}, [None], ["x"], [float("nan")],
    [1e308] * 4, "9" * 10_000, [0] * 1000, {"__class__": "os.system"},
]  # fmt: skip


def read_whole(path: Path) -> None:
    images = open_samples(path)
    for _ in images.batches(range(len(images)), batch_size=2, num_workers=0):
        pass


def write_archive(folder: Path) -> Path:
    write_sample_set(folder / "a.npz", np.zeros((4, 8, 8, 3), np.uint8), np.arange(4))
    return folder / "a.npz"


def write_packed_archive(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3))
        archive.writestr("arr_0.npy", buffer.getvalue())
    return folder / "a.npz"


def write_moments(folder: Path) -> Path:
    np.savez(folder / "a.npz", mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(3), sigma_s=np.eye(3))
    return folder / "a.npz"


def small_autoencoder() -> KLAutoencoder:
    model = AutoencoderKL(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, latent_channels=2)
    return KLAutoencoder(model.eval(), name="small")


def write_autoencoder(folder: Path) -> Path:
    small_autoencoder().save(folder)
    return folder / "config.json"


def write_checkpoint(folder: Path) -> Path:
    state = {"x_embedder.proj.weight": torch.ones(2, 1, 1, 1), "final_layer.linear.weight": torch.ones(2, 2)}
    args = {"lr": np.float64(1e-4), "path": Path("a")}
    torch.save({"model": state, "ema": state, "opt": {"state": {0: torch.ones(2)}}, "args": args}, folder / "a.pt")
    return folder / "a.pt"


def write_old_checkpoint(folder: Path) -> Path:
    state = torch.load(write_checkpoint(folder), weights_only=False)["model"]
    torch.save({"model": state}, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def write_safetensors(folder: Path) -> Path:
    save_file(torch.load(write_checkpoint(folder), weights_only=False)["ema"], folder / "a.safetensors")
    return folder / "a.safetensors"


def write_run(folder: Path) -> Path:
    recipe, latents = find_recipe("dit-ti-2"), LatentSpecification(channels=2, height=4, width=4, num_classes=2)
    config = recipe.transformer(latents)
    card = GeneratorCard(
        family="dit", recipe="dit-ti-2", transformer=config, interpolant=None, shift=(0.0, 0.0), scale=(1.0, 1.0),
        autoencoder="tiny-kl", autoencoder_fingerprint="0" * 16, image_size_px=32, class_names=("a", "b"), num_steps=20,
        eqvae_version="0",
    )  # fmt: skip
    write_generator(folder, card, {"ema": config.build().state_dict()})
    journal = [
        {"kind": "train", "step": step, "loss": 0.5, "training_sec": 1.0 * step, "images_per_sec": 3.0}
        for step in (10, 20)
    ] + [
        {"kind": "validation", "step": step, "training_sec": 1.0 * step, "fid": 9.0, "num_samples": 50}
        for step in (10, 20)
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal))
    write_json(folder / "config.json", {
        "command": "train", "recipe": "dit-ti-2", "batch_size": 4, "max_steps": 20, "seed": 0, "features": "inception",
        "latents": str(folder), "reference": "photos", "learning_rate": 1e-4,
    })  # fmt: skip
    write_json(folder / "environment.json", {"device": "cpu", "command": ["eqvae", "train"], "torch": "2"})
    write_json(folder / "metrics.json", {"num_steps": 20, "num_parameters": 5, "fid": 9.0})
    return folder / "config.json"


def write_evaluation(folder: Path) -> Path:
    first, second, third, fourth = torch.zeros(4, 1, 3, 8, 8, dtype=torch.uint8).clone()
    Pictures(
        images=first.clone(), latents=torch.zeros(1, 2, 2, 2), reconstructions=second.clone(),
        encoded_transformed=(third.clone(),), decoded_transformed=(fourth.clone(),), transforms=("90",),
    ).write(folder / "pictures.safetensors")  # fmt: skip
    write_json(folder / "config.json", {"command": "evaluate", "autoencoder": "a", "data": "photos", "image_size": 8})
    write_json(folder / "metrics.json", {"psnr_db": 30.0, "num_images": 3, "latent_mean_0": 0.5})
    curves = {name: [0.1, 0.2] for name in ("frequency", "latent_power", "image_power")}
    write_json(folder / "spectrum.json", curves)
    return folder / "metrics.json"


def write_index(folder: Path) -> Path:
    write_json(folder / "index.json", {
        "version": 1, "kind": "moments", "image_size_px": 16, "stride": 8, "latent_channels": 2, "latent_height": 2,
        "latent_width": 2, "codebook_size": None, "num_images": 3, "num_broken": 0, "num_classes": 2,
        "class_names": ["a", "b"], "has_mirrored": True, "has_std": True, "dtype": "float16",
        "statistics": {name: [0.5, 1.0] for name in ("mean", "std", "std_of_means")}, "autoencoder": "a",
        "fingerprint": "0" * 16, "preprocessing": "adm-crop", "data": "photos", "data_fingerprint": "0" * 16,
        "shard_size": 8, "command": "eqvae encode", "eqvae_version": "0",
        "shards": [{"file": "shard-00000.safetensors", "first": 0, "count": 3, "sha256": "0", "num_bytes": 9}],
    })  # fmt: skip
    read_index(folder)
    return folder / "index.json"


def beside(name: str, write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    return lambda folder: write(folder).with_name(name)


def of_folder(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: read(path.parent)


BYTES: dict[str, Case] = {
    "checkpoint": (read_official, write_checkpoint),
    "old checkpoint": (read_official, write_old_checkpoint),
    "safetensors": (read_official, write_safetensors),
    "npz": (read_whole, write_archive),
    "lzma npz": (read_whole, write_packed_archive),
    "moments": (lambda path: with_adm_moments(None, path), write_moments),
    "pictures": (Pictures.read, beside("pictures.safetensors", write_evaluation)),
    "weights": (of_folder(lambda folder: load_autoencoder(str(folder))),
                beside("diffusion_pytorch_model.safetensors", write_autoencoder)),
    "journal": (of_folder(read_curve), beside("journal.jsonl", write_run)),
    "json": (of_folder(read_index), write_index),
}  # fmt: skip

JSON: dict[str, Case] = {
    "autoencoder": (of_folder(lambda folder: load_autoencoder(str(folder))), write_autoencoder),
    "card": (lambda path: read_card(path.parents[1]), lambda folder: write_run(folder).with_name("generator") / CARD),
    "index": (of_folder(read_index), write_index),
    "config": (of_folder(read_curve), write_run),
    "environment": (of_folder(read_curve), beside("environment.json", write_run)),
    "report's config": (of_folder(lambda folder: read_folders([folder])), write_run),
    "report's metrics": (of_folder(lambda folder: read_folders([folder])), write_evaluation),
    "report's spectrum": (of_folder(lambda folder: read_folders([folder])), beside("spectrum.json", write_evaluation)),
}  # fmt: skip


def refuses_or_reads(read: Callable[[Path], Any], path: Path) -> bool:
    """Whether a file is read; else it is refused by one line that names it, soon and in little memory."""
    began_sec = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error) and path.parent.name in str(error)
            return False
        finally:
            assert time.monotonic() - began_sec < MOST_SEC
    return True


def damage(content: bytes, data: st.DataObject) -> bytes:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "drop", "repeat"]))
        if kind == "flip" and damaged:
            damaged[position] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            damaged[position : position + 8] = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x80" + bytes(7)]))
        elif kind == "cut":
            del damaged[position:]
        elif kind == "insert":
            damaged[position:position] = data.draw(st.binary(max_size=8))
        elif kind == "drop":
            del damaged[position : position + data.draw(st.integers(1, 64))]
        else:
            damaged[position:position] = damaged[position : position + 32]
    return bytes(damaged)


def change(content: Any, data: st.DataObject) -> Any:
    """Replace, remove or add one entry, however deep."""
    if isinstance(content, dict | list) and content and data.draw(st.integers(0, 3)):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = data.draw(st.sampled_from(keys))
        copy = content.copy()
        copy[key] = change(content[key], data)
        return copy
    if isinstance(content, dict) and data.draw(st.booleans()):
        return {name: value for name, value in content.items() if data.draw(st.booleans())} | {"extra": 1}
    return data.draw(st.sampled_from(VALUES))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_bytes(name: str, folder: Path, num_examples: int) -> dict[str, int]:
    read, write = BYTES[name]
    path = write(folder)
    whole, found, before = path.read_bytes(), {"read": 0, "refused": 0}, peak_bytes()
    read(path)

    @settings(max_examples=num_examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        path.write_bytes(damage(whole, data))
        found["read" if refuses_or_reads(read, path) else "refused"] += 1

    attempt()
    assert peak_bytes() - before < MOST_BYTES
    return found


def try_json(name: str, folder: Path, num_examples: int) -> dict[str, int]:
    read, write = JSON[name]
    path = write(folder)
    whole, found, before = json.loads(path.read_text()), {"read": 0, "refused": 0}, peak_bytes()
    read(path)

    @settings(max_examples=num_examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        path.write_text(json.dumps(change(whole, data)))
        found["read" if refuses_or_reads(read, path) else "refused"] += 1

    attempt()
    assert peak_bytes() - before < MOST_BYTES
    return found


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes(name: str, tmp_path: Path) -> None:
    try_bytes(name, tmp_path, 8)


@pytest.mark.parametrize("name", JSON)
def test_hostile_values(name: str, tmp_path: Path) -> None:
    try_json(name, tmp_path, 10)


@pytest.mark.faults
@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes_by_thousands(name: str, tmp_path: Path, counts: dict[str, Any]) -> None:
    counts["damaged_bytes"] = {name: try_bytes(name, tmp_path, 200 if name == "weights" else 1000)}


@pytest.mark.faults
@pytest.mark.parametrize("name", JSON)
def test_hostile_values_by_thousands(name: str, tmp_path: Path, counts: dict[str, Any]) -> None:
    counts["hostile_values"] = {name: try_json(name, tmp_path, 300 if name == "autoencoder" else 500)}


# Known files ---------------------------------------------------------------------------------------------------------


def command_fails(*arguments: str) -> str:
    said = io.StringIO()
    began_sec = time.monotonic()
    with redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(list(arguments)) == 2
    assert time.monotonic() - began_sec < MOST_SEC
    (line,) = said.getvalue().splitlines()
    return line


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
def test_files_that_got_through_once(tmp_path: Path) -> None:
    before, out = peak_bytes(), str(tmp_path / "out")
    for path in sorted(CASES.glob("ckpt-*")):
        assert path.name in command_fails("evaluate", str(path), "--data", "photos", "--out", out)
    for path in sorted(CASES.glob("npz-*")):
        assert path.name in command_fails("score", str(path), "--reference", str(path), "--out", out)
    for path in sorted(CASES.glob("yaml-*")):
        required = ["untrained:tiny-kl", "--data", "no/such", "--out", out]
        command_fails("finetune", *required, "--config", str(path))
    assert peak_bytes() - before < MOST_BYTES
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: !!python/object/apply:os.system [ls]", "'lr' is"), ("data: {a: 1}", "'data' is"),
        ("data: [1, 2]", "a list"),
        ("a: &x [*x]", "'a' is"), ("seed: 1\nseed: 2", "comes twice, in line 2"), ("[" * 5000, "is no YAML"),
        ("seed: " + "9" * 5000, "config.yaml"), ("? [1]\n: 2", "no word"), ("\x00", "is no YAML"), ("{", "is no YAML"),
        ("- 1", "holds no 'name: value' lines"), ("seed: !!int x", "config.yaml"), ("x" * 100_000, "more than"),
        ("seed: 2024-13-45", "config.yaml"), ("seed: .nan", "config.yaml"), ("flip: !!timestamp x", "'flip' is"),
    ],
)  # fmt: skip
def test_configurations_construct_nothing(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    line = command_fails("finetune", "untrained:tiny-kl", "--data", "photos", "--out", "out", "--config", str(path))
    assert says in line or "does not know" in line
    assert "config.yaml" in line


def test_an_archive_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2000, 256, 256, 3)})
    packed = zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED)
    with packed as archive, archive.open("arr_0.npy", "w") as file:
        file.write(header.getvalue())
        for _ in range(2000 // 40):
            file.write(bytes(40 * 256 * 256 * 3))
    assert not refuses_or_reads(read_whole, tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(10**6, 10**6), (True, 4), (-1, 4), (2**80,), ()])
def test_moments_that_lie_about_their_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(80)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", content)
        archive.writestr("sigma.npy", content)
    assert not refuses_or_reads(lambda path: with_adm_moments(None, path), tmp_path / "a.npz")


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    for content in (Evil(), {"a": Evil()}, [Evil()], {"model": {"a": torch.ones(1), "b": Evil()}}):
        torch.save(content, tmp_path / "a.pt")
        assert not refuses_or_reads(read_official, tmp_path / "a.pt")
        (tmp_path / "a.pt").write_bytes(pickle.dumps(content, protocol=2))
        assert not refuses_or_reads(read_official, tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()


def test_a_generators_card_of_ten_million_blocks(tmp_path: Path) -> None:
    path = write_run(tmp_path).parent / "generator/generator.json"
    card = json.loads(path.read_text())
    for field, value in (("depth", 10**7), ("hidden_size", 2**40), ("num_heads", 0), ("patch_size", -1)):
        path.write_text(json.dumps(card | {"transformer": card["transformer"] | {field: value}}))
        assert not refuses_or_reads(lambda path: read_generator(path.parents[1]), path)


def test_a_generator_that_is_not_finite(tmp_path: Path) -> None:
    path = write_run(tmp_path).parent / "generator/ema.safetensors"
    state = load_file(path)
    state["final_layer.linear.bias"][0] = float("nan")
    save_file(state, path)
    with pytest.raises(UserError, match=r"ema.safetensors' has diverged or is damaged: 'final_layer.linear.bias'"):
        read_generator(tmp_path)


def test_types_are_told_with_their_place(tmp_path: Path) -> None:
    assert to_type(tuple[float, ...], [1, 2.5], where="scale") == (1.0, 2.5)
    with pytest.raises(ValueError, match=r"^scale\[1\] is 'x', no float$"):
        to_type(tuple[float, ...], [1, "x"], where="scale")
    write_json(tmp_path / "metrics.json", {"psnr_db": 1.0})
    (tmp_path / "metrics.json").write_text('{"psnr_db": "30"}')
    with pytest.raises(UserError, match=r"metrics.json' is damaged \(psnr_db is '30', no float\)"):
        read_json(tmp_path / "metrics.json")
