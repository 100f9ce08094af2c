"""What the command line's tests share: no network, and a saved autoencoder."""

from pathlib import Path

import pytest


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
