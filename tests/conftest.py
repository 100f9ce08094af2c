"""What the tests share: small autoencoders of known behaviour, real photographs, untrained networks, threads."""

import datetime
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from eqvae.artifacts.files import write_json
from eqvae.autoencoders.protocol import Autoencoder, DiscreteAutoencoder, LatentStatistics, Posterior

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models beside the checkout; users don't have it."""
    if not SHARED.exists():
        pytest.skip("needs ../shared, which only the project's own machines have")
    return SHARED


_BEGAN_SEC = time.monotonic()
_SLOW_SEC = float(os.environ.get("EQVAE_SLOW_SEC", "inf"))
"""Seconds after which no further long test begins; `make test` sets it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where time is short, other files of long tests come first each day, so that all have their turn."""
    if math.isfinite(_SLOW_SEC):
        today = str(datetime.datetime.now(datetime.UTC).date())
        items.sort(key=lambda item: hashlib.sha256(f"{today} {item.path}".encode()).digest())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a long test out once the time for them is over."""
    if item.get_closest_marker("slow") and time.monotonic() - _BEGAN_SEC > _SLOW_SEC:
        pytest.skip(f"the {_SLOW_SEC:.0f} s for long tests are over: `make slow` runs all")


class AveragingAutoencoder(Autoencoder):
    """Exactly equivariant: the latent is the image averaged over cells, the decoder repeats each cell."""

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        self.name, self.stride, self.latent_channels = "averaging", stride, 3
        self.layer = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.layer.weight)
        self.statistics: LatentStatistics | None = None

    def encode(self, x: Float[Tensor, "n 3 h w"]) -> Posterior:
        return Posterior(mean=nn.functional.avg_pool2d(x, self.stride))

    def decode(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        return self.layer(z.repeat_interleave(self.stride, -1).repeat_interleave(self.stride, -2))

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.layer

    def set_latent_statistics(self, statistics: LatentStatistics) -> None:
        self.statistics = statistics

    def save(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder / "weights.pt")


class SmallAutoencoder(AveragingAutoencoder):
    """A trainable Gaussian autoencoder of a few thousand parameters: stride 4, 4 channels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(stride=4)
        self.name, self.latent_channels = "small", 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1))
            self.decoder = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(16, 8, 4, 4))
            self.layer = nn.Conv2d(8, 3, 3, padding=1)

    def encode(self, x: Float[Tensor, "n 3 h w"]) -> Posterior:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return Posterior(mean=mean, log_variance=log_variance.clamp(-30.0, 20.0))

    def decode(self, z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        return self.layer(self.decoder(z))


class SmallDiscreteAutoencoder(DiscreteAutoencoder, AveragingAutoencoder):
    """A trainable autoencoder with 24 codes of 4 numbers: stride 4."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(stride=4)
        self.name, self.latent_channels = "small-discrete", 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1))
            self.codes = nn.Parameter(0.3 * torch.randn(24, 4))
            self.decoder = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(16, 8, 4, 4))
            self.layer = nn.Conv2d(8, 3, 3, padding=1)

    def encode(self, x: Float[Tensor, "n 3 h w"]) -> Posterior:
        return Posterior(mean=self.encoder(x))

    @property
    def codebook(self) -> nn.Parameter:
        return self.codes

    def decode_quantized(self, z_q: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        return self.layer(self.decoder(z_q))


@pytest.fixture
def averaging_autoencoder() -> AveragingAutoencoder:
    """An exactly equivariant autoencoder."""
    return AveragingAutoencoder()


@pytest.fixture
def small_autoencoder() -> SmallAutoencoder:
    """A trainable autoencoder."""
    return SmallAutoencoder()


@pytest.fixture
def small_discrete_autoencoder() -> SmallDiscreteAutoencoder:
    """A trainable autoencoder with a codebook."""
    return SmallDiscreteAutoencoder()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of six crops from real photographs, 96 px high, whichever are held out."""
    from PIL import Image

    from eqvae.images import data

    folder, home = tmp_path / "photographs", Path(data.__file__).with_name("photographs")
    folder.mkdir()
    names = ("astronaut", "coffee", "hubble_deep_field", "motorcycle_left", "motorcycle_right", "china")
    for index, name in enumerate(names):
        (path,) = home.glob(f"{name}.*")
        Image.open(path).convert("RGB").resize((144, 96)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def untrained_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.pth` of random weights of Inception-v3 whose signal neither dies nor explodes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        """Takes no weights."""

        def load_state_dict(self, *_: object, **__: object) -> None:
            """Leave everything as it is."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    state = Blank("blank", ["2048"], feature_extractor_weights_path=nothing).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, weight in state.items():
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            state[name] = torch.randn(weight.shape, generator=generator) * math.sqrt(2 / fan_in)
        elif name == "fc.bias":
            state[name] = torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "untrained.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of timm's small `test_resnet`, untrained."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet")
    path = tmp_path_factory.mktemp("timm") / "resnet.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder as `eqvae train` does: `write("base", values=[...], seed=1, autoencoder="tiny-kl", **fields)`."""

    def write(
        name: str, values: Sequence[float] = (9.0, 6.0, 5.0), *, seed: int = 0, autoencoder: str = "tiny-kl",
        every: int = 10, sec_per_step: float = 0.5, **fields: Any,
    ) -> Path:  # fmt: skip
        folder = tmp_path / name
        config = {
            "command": "train", "recipe": "dit-ti-2", "latents": f"latents/{autoencoder}", "out": str(folder),
            "latents_fingerprint": f"digest of {autoencoder}", "max_steps": every * len(values), "batch_size": 4,
            "learning_rate": 1e-4, "normalization": "measured", "seed": seed, "reference": "photos",
            "features": "efficientnet-lite0", "num_watch_samples": 50, "watch_steps": 8, "compile": False,
        }  # fmt: skip
        write_json(folder / "config.json", config | fields)
        write_json(folder / "environment.json", {"device": "cpu (test)"})
        card = {"autoencoder": autoencoder, "shift": [0.1], "scale": [1.2], "image_size_px": 32}
        write_json(folder / "generator" / "generator.json", card)
        records = [{"kind": "train", "step": 1, "loss": 1.0}]
        for step, value in zip(range(every, every * len(values) + 1, every), values, strict=True):
            time = {"step": step, "training_sec": sec_per_step * step}
            records.append({"kind": "validation", **time, "fd_efficientnet_lite0": value, "num_samples": 50})
        (folder / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return write
