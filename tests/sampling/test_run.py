"""A sampling run: one archive for any batch size and number of processes, resumed from whole parts."""

import copy
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from eqvae.artifacts.files import read_journal, read_json, write_json
from eqvae.artifacts.names import SAMPLE_PARTS, SAMPLE_SET, SAMPLE_SHEET
from eqvae.errors import Interrupted, UserError
from eqvae.generators.checkpoints import Generator, GeneratorCard
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import Transformer, TransformerConfig
from eqvae.runs import sample as run_module
from eqvae.runs.sample import SampleConfig, draw_samples
from eqvae.runtime.processes import Processes
from eqvae.runtime.signals import StopRequest
from eqvae.sampling.draw import Drawer, contact_sheet, sheet_indices

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass(frozen=True, kw_only=True)
class NumberDrawer(Drawer):
    """Image i is of the one colour i; counts what it draws, and may be killed."""

    config: SampleConfig

    drawn: list[int] = field(default_factory=list)

    die_after: int | None = None
    """Images after which the process ends."""

    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "n 3 h w"]:
        if self.die_after is not None and len(self.drawn) >= self.die_after:
            raise KilledError
        self.drawn.extend(indices)
        colours: Int64[Tensor, " n"] = torch.tensor(indices)
        return colours.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)


def sample(drawer: NumberDrawer, processes: Processes) -> dict:
    return draw_samples(drawer, drawer.config, processes)


@pytest.fixture
def drawer(averaging_autoencoder, tmp_path: Path, monkeypatch):
    """Makes drawers of 40 samples of 3 classes in parts of 8."""
    monkeypatch.setattr(run_module, "IMAGES_PER_PART", 8)
    config = TransformerConfig(
        latents=LatentSpecification(channels=3, height=2, width=2, num_classes=3), depth=1, hidden_size=8,
        num_heads=1, patch_size=2, out_channels=6,
    )  # fmt: skip
    card = GeneratorCard(
        family="dit", recipe="dit-ti-2", transformer=config, interpolant=None, shift=(0.0,) * 3, scale=(1.0,) * 3,
        autoencoder="averaging", autoencoder_fingerprint="0", image_size_px=4, class_names=None, num_steps=1,
        eqvae_version="0",
    )  # fmt: skip

    transformer = Transformer(config)

    def make(name: str = "out", die_after: int | None = None, num_steps: int = 1, **options) -> NumberDrawer:
        settings = {"num_samples": 40, "batch_size": 3} | options
        return NumberDrawer(
            generator=Generator(card=replace(card, num_steps=num_steps), transformer=transformer),
            autoencoder=averaging_autoencoder, device=torch.device("cpu"), die_after=die_after,
            config=SampleConfig(run="run", out=tmp_path / name, **settings),
        )  # fmt: skip

    return make


def test_the_archive(drawer):
    one = drawer()
    figures = sample(one, ALONE)
    out = one.config.out
    with np.load(out / SAMPLE_SET, allow_pickle=False) as archive:
        assert sorted(archive) == ["arr_0", "arr_1"]
        images, labels = archive["arr_0"], archive["arr_1"]
    assert (images.shape, images.dtype) == ((40, 4, 4, 3), np.uint8)
    assert images[:, 0, 0, 0].tolist() == list(range(40))
    assert labels.tolist() == [index % 3 for index in range(40)]
    assert figures["num_samples"] == 40
    assert read_json(out / "config.json")["command"] == "sample"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "environment.json", "metrics.json", SAMPLE_SET, SAMPLE_SHEET,
    ]  # fmt: skip


def archive_of(one: NumberDrawer) -> bytes:
    return (one.config.out / SAMPLE_SET).read_bytes()


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_the_batch_size_changes_nothing(drawer, batch_size: int):
    one, other = drawer("one"), drawer("other", batch_size=batch_size)
    sample(one, ALONE)
    sample(other, ALONE)
    assert archive_of(one) == archive_of(other)


def test_killed_and_continued(drawer):
    straight = drawer("straight")
    sample(straight, ALONE)
    with pytest.raises(KilledError):
        sample(drawer("broken", die_after=20), ALONE)
    resumed = drawer("broken", batch_size=5)
    sample(resumed, ALONE)
    assert sorted(resumed.drawn) == list(range(16, 40))  # two whole parts were there
    assert archive_of(resumed) == archive_of(straight)
    assert not (resumed.config.out / SAMPLE_PARTS).exists()


def test_a_run_from_before_tokens_goes_on(drawer):
    with pytest.raises(KilledError):
        sample(drawer(die_after=20), ALONE)
    path = drawer().config.out / "config.json"
    saved = read_json(path)
    assert saved["num_steps"] == 250
    for name in ("schedule", "temperature", "top_k", "choice_temperature", "guidance_schedule"):
        del saved[name]
    del saved["generator"]["schedule"]
    write_json(path, saved)
    resumed = drawer()
    assert sample(resumed, ALONE)["num_samples"] == 40
    assert len(resumed.drawn) == 24


def test_killed_while_the_parts_are_joined(drawer, monkeypatch):
    def die(*arguments: object, **named: object) -> None:
        raise KilledError

    with monkeypatch.context() as context:
        context.setattr(run_module, "contact_sheet", die)
        with pytest.raises(KilledError):
            sample(drawer(), ALONE)
    resumed = drawer()
    sample(resumed, ALONE)
    assert resumed.drawn == []
    again = drawer()
    assert sample(again, ALONE)["num_samples"] == 40  # finished: nothing is done
    assert again.drawn == []


@pytest.mark.parametrize("die_after", [None, 10, 1])
@pytest.mark.parametrize("num_before", [19, 24])
def test_a_set_is_made_longer(drawer, num_before: int, die_after: int | None):
    straight = drawer("straight")
    sample(straight, ALONE)
    sample(drawer(num_samples=num_before), ALONE)
    if die_after is not None:
        with pytest.raises(KilledError):
            sample(drawer(die_after=die_after), ALONE)
        assert (drawer().config.out / SAMPLE_SET).exists()
    longer = drawer()
    assert sample(longer, ALONE)["num_samples"] == 40
    assert min(longer.drawn) >= num_before
    assert archive_of(longer) == archive_of(straight)
    assert (longer.config.out / SAMPLE_SHEET).read_bytes() == (straight.config.out / SAMPLE_SHEET).read_bytes()
    assert not (longer.config.out / SAMPLE_PARTS).exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content[:-3] + b"xyz"])
def test_a_damaged_part_is_drawn_again(drawer, capsys, damage):
    straight = drawer("straight")
    sample(straight, ALONE)
    with pytest.raises(KilledError):
        sample(drawer("broken", die_after=20), ALONE)
    path = drawer("broken").config.out / SAMPLE_PARTS / "00000008.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    resumed = drawer("broken")
    sample(resumed, ALONE)
    assert sorted(resumed.drawn) == list(range(8, 40))
    assert archive_of(resumed) == archive_of(straight)
    assert "00000008.safetensors' is damaged: its samples are drawn again" in capsys.readouterr().err
    assert read_journal(resumed.config.out) == [{"kind": "damaged_part", "file": "00000008.safetensors"}]


@dataclass(frozen=True, kw_only=True)
class Apart(Processes):
    """One of two processes; no collective takes any time."""

    def wait(self) -> None:
        pass

    def gather(self, value: float) -> list[float]:
        return [value, 0.0]


def test_a_slower_process_is_waited_for_by_its_files(drawer):
    straight, one = drawer("straight"), drawer("two")
    sample(straight, ALONE)
    first, second = (Apart(rank=rank, count=2, device=torch.device("cpu")) for rank in (0, 1))
    with ThreadPoolExecutor(1) as pool:

        def draw_late() -> None:
            time.sleep(1.0)
            missing = run_module._parts(0, 40)[1::2]
            run_module._draw_parts(one, one.config, missing, 16, second, StopRequest())

        late = pool.submit(draw_late)
        sample(one, first)
        late.result()
    assert archive_of(one) == archive_of(straight)


def test_an_archive_is_what_numpy_writes(drawer, tmp_path: Path):
    sample(drawer(), ALONE)
    with np.load(drawer().config.out / SAMPLE_SET) as archive:
        np.savez(tmp_path / "numpy.npz", **archive)
    assert archive_of(drawer()) == (tmp_path / "numpy.npz").read_bytes()


def test_a_signal_during_the_join(drawer, monkeypatch):
    def read(path: Path) -> tuple:
        if joining:
            signal.raise_signal(signal.SIGTERM)
        return original(path)

    joining, original = [], run_module.read_tensors
    plain = run_module._join_parts
    monkeypatch.setattr(run_module, "read_tensors", read)
    monkeypatch.setattr(run_module, "_join_parts", lambda *given: joining.append(1) or plain(*given))
    with pytest.raises(Interrupted, match="SIGTERM"):
        sample(drawer(), ALONE)
    joining.clear()
    monkeypatch.setattr(run_module, "_join_parts", plain)
    resumed = drawer()
    sample(resumed, ALONE)
    assert resumed.drawn == []


def test_a_signal_keeps_whole_parts(drawer, monkeypatch):
    one = drawer()
    original = NumberDrawer.images

    def images(self: NumberDrawer, indices: Sequence[int]) -> Tensor:
        if 20 in indices:
            signal.raise_signal(signal.SIGTERM)
        return original(self, indices)

    monkeypatch.setattr(NumberDrawer, "images", images)
    with pytest.raises(Interrupted, match="SIGTERM; the same command goes on"):
        sample(one, ALONE)
    assert len(list((one.config.out / SAMPLE_PARTS).iterdir())) == 2


def test_the_same_folder_for_something_else(drawer):
    sample(drawer(), ALONE)
    for options, what in [({"seed": 1}, "--seed 0, not 1"), ({"num_samples": 39}, "more than --num-samples 39"),
                          ({"num_steps": 2}, "at step 1, not 2")]:  # fmt: skip
        with pytest.raises(UserError, match=what):
            sample(drawer(**options), ALONE)
    write_json(drawer().config.out / "config.json", {"command": "train"})
    with pytest.raises(UserError, match="belongs to 'eqvae train'"):
        sample(drawer(), ALONE)


@pytest.mark.parametrize(
    ("num_samples", "num_classes", "first_rows"),
    [(100, 10, [[0, 10, 20], [1, 11, 21]]), (50_000, 1000, [list(range(0, 3000, 1000)), [1, 1001, 2001]]),
     (30, 3, [[0, 3, 6], [1, 4, 7]]), (29, 3, [[0, 1, 2], [10, 11, 12]]), (50, 0, [[0, 1, 2], [10, 11, 12]])],
)  # fmt: skip
def test_rows_of_the_sheet_are_classes(num_samples: int, num_classes: int, first_rows: list[list[int]]):
    indices = sheet_indices(num_samples, num_classes)
    assert [indices[:3], indices[10:13]] == first_rows
    assert len(indices) <= 100
    assert max(indices) < num_samples


def test_the_sheet_is_drawn_row_by_row(tmp_path: Path):
    images = torch.arange(1, 7, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4) * 20
    contact_sheet(images, tmp_path / "sheet.png", num_columns=3)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert pixels[2:6, 2:20, 0][2].tolist()[:10] == [20, 20, 20, 20, 255, 255, 40, 40, 40, 40]
    assert pixels[10, 3, 0] == 80


def test_samples_of_other_weights_are_not_mixed(drawer):
    first = drawer(num_samples=8)
    sample(first, ALONE)
    other = drawer(num_samples=16)
    weights = copy.deepcopy(other.generator.transformer)
    with torch.no_grad():
        next(iter(weights.parameters())).add_(1.0)
    other = replace(other, generator=replace(other.generator, transformer=weights))
    with pytest.raises(UserError, match="holds samples of other weights than 'run'"):
        sample(other, ALONE)
    assert sample(drawer(num_samples=16), ALONE)["num_samples"] == 16
