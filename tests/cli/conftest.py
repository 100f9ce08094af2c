"""What the command line's tests share: no network, and a saved autoencoder."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eqvae.runs.train as generator_run
from eqvae.cli import run
from eqvae.runtime.run_folder import hold_output_folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach for the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def saved_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the untrained `tiny-kl`."""
    from eqvae.autoencoders import load_autoencoder

    folder = tmp_path_factory.mktemp("tiny-kl")
    load_autoencoder("untrained:tiny-kl").save(folder)
    return folder


@pytest.fixture
def refused_while_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str], Path], None]:
    """Runs a command while somebody else holds its output folder: it says so and writes nothing."""
    monkeypatch.setattr("eqvae.runtime.run_folder._PATIENCE_SEC", 0.0)

    def check(arguments: Sequence[str], out: Path) -> None:
        out.mkdir()
        with hold_output_folder(out):
            assert run(arguments) == 2
        assert f"Another process is writing into '{out}'" in capsys.readouterr().err
        assert not any(out.iterdir())

    return check


@pytest.fixture(scope="module")
def known_peak() -> Iterator[None]:
    """Spend no seconds on measuring the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_run, "matrix_peak_flops_per_sec", lambda device, precision: 1e12)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight noisy images of 32 px, a colour for each of two classes."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for index in range(8):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = (200, 60)[index % 2] + random.integers(-40, 40, (32, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder
