"""`eqvae finetune --method NAME` for every name, on continuous and discrete autoencoders: runs, stops, resumes."""

from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_json, read_tensors
from eqvae.artifacts.names import CHECKPOINT
from eqvae.errors import UserError
from eqvae.methods import METHODS
from eqvae.runs.finetune import FinetuneConfig, finetune
from eqvae.runtime.run_folder import from_flat
from interruptions import interrupt, train_records

NOT_DISCRETE = {name for name, kind in METHODS.items() if kind.not_discrete}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs of 64 px."""
    from eqvae.images import open_images

    folder, source = tmp_path_factory.mktemp("pictures"), open_images("photos")
    for index in range(4):
        source.read(index).resize((64, 64)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def configure(pictures: Path, tmp_path: Path):
    """A function that makes the configuration of a run of half a second."""

    def make(method: str, out: str = "run", **changes) -> FinetuneConfig:
        defaults = {
            "autoencoder": "small", "data": str(pictures), "validation_data": str(pictures), "method": method,
            "out": tmp_path / out, "max_steps": 4, "image_size": 64, "batch_size": 2, "learning_rate": 1e-3,
            "adversarial_weight": 0.0, "perceptual": "none", "precision": "fp32", "num_workers": 0, "log_every": 1,
            "num_validation_images": 1, "num_statistics_images": 2, "validate_every": 100, "ema_decay": 0.0,
        }  # fmt: skip
        return from_flat(FinetuneConfig, **defaults | changes)

    return make


def run_and_resume(configure, new_autoencoder, method: str) -> None:
    """A run at one go, and one that is stopped after two of its four steps: the same journal, weights and moments."""
    whole, parted = configure(method, "whole"), configure(method, "parted")
    finetune(whole, new_autoencoder())
    interrupt(parted, new_autoencoder(), 2)
    finetune(parted, new_autoencoder())
    records = train_records(whole.out)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert train_records(parted.out) == records
    (one, _), (other, _) = (read_tensors(config.out / CHECKPOINT) for config in (whole, parted))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert f"{method}" in read_json(whole.out / "config.json")["mixture"]
    learned = {"lmr": {"parts.0-lmr.vector"}, "vf": {"parts.1-vf.convolution.weight"}}.get(method, set())
    assert {name for name in one if name.startswith("parts.")} == learned
    exported = torch.load(whole.out / "autoencoder" / "weights.pt", weights_only=True)
    before = new_autoencoder().state_dict()
    assert exported.keys() == before.keys()
    assert any(not torch.equal(one[f"autoencoder.{name}"], value) for name, value in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_resumes_on_a_continuous_autoencoder(configure, small_autoencoder, method):
    run_and_resume(configure, type(small_autoencoder), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in NOT_DISCRETE])
def test_every_method_trains_and_resumes_on_a_discrete_autoencoder(configure, small_discrete_autoencoder, method):
    run_and_resume(configure, type(small_discrete_autoencoder), method)


@pytest.mark.parametrize("method", sorted(NOT_DISCRETE))
def test_what_makes_no_sense_before_quantization_is_one_line(configure, small_discrete_autoencoder, method):
    config = configure(method)
    with pytest.raises(UserError, match=f"--method {method} makes no sense for 'small-discrete', which is discrete: "):
        finetune(config, small_discrete_autoencoder)
    assert not config.out.exists()
