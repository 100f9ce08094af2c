"""What the command line's tests share: no network, and a saved autoencoder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

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
