"""LoRA and an encoder trained alone: what learns and what stays, merged exports, resumption."""

import copy
from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_tensors
from eqvae.autoencoders import build_autoencoder, load_autoencoder
from eqvae.autoencoders.padding import set_padding_mode
from eqvae.errors import UserError
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.runs.finetune import FinetuneConfig, finetune, plan
from eqvae.runtime.run_folder import change_flat, from_flat
from eqvae.training.adapters import add_adapters, merged, trained_parameters
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import build_state
from eqvae.training.autoencoder_step import train_step

CPU = torch.device("cpu")


@pytest.fixture
def configure(photographs: Path, tmp_path: Path):
    def make(out: str = "run", **changes) -> FinetuneConfig:
        quick = {
            "autoencoder": "tiny-kl", "data": str(photographs), "validation_data": str(photographs),
            "out": tmp_path / out, "image_size": 64, "batch_size": 1, "max_steps": 2, "learning_rate": 1e-3,
            "perceptual": "none", "adversarial_weight": 0.0, "precision": "fp32", "num_workers": 0, "log_every": 1,
            "num_validation_images": 1, "num_statistics_images": 1, "device": "cpu", "lr_warmup_steps": 0,
        }  # fmt: skip
        return from_flat(FinetuneConfig, **quick | changes)

    return make


def take_steps(autoencoder, count: int = 2, **changes):
    """Some steps of a training; the state after them."""
    quick = {"max_steps": 4, "batch_size": 2, "perceptual": "none", "precision": "fp32", "lr_warmup_steps": 0,
             "learning_rate": 1e-2}  # fmt: skip
    training = from_flat(AutoencoderTraining, **quick | changes).resolved()
    state = build_state(autoencoder, training, CPU)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = ReconstructionLoss("none", 0.0)
    records = [train_step(state, x, training.at(state.step), loss, training.mixture()) for _ in range(count)]
    return state, records


def moved(state, base: dict[str, torch.Tensor]) -> set[str]:
    """Parts of the exported autoencoder that differ from the base."""
    exported = state.exported().state_dict()
    assert exported.keys() == base.keys()
    return {name.split(".")[0] for name, value in exported.items() if not value.equal(base[name])}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_merged_weights_are_the_adapted_model(small_autoencoder, ema_decay):
    base = copy.deepcopy(small_autoencoder.state_dict())
    state, _ = take_steps(small_autoencoder, lora_rank=2, ema_decay=ema_decay, adversarial_weight=0.0)
    adapted, exported = state.autoencoder if ema_decay == 0 else state.averaged, state.exported()
    assert type(exported) is type(adapted)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    posterior, wanted = exported.encode(x), adapted.encode(x)
    torch.testing.assert_close(posterior.mean, wanted.mean)
    torch.testing.assert_close(exported.decode(posterior.mean), adapted.decode(posterior.mean))
    assert (wanted.mean - type(adapted)().encode(x).mean).abs().max() > 1e-4
    assert moved(state, base) == {"encoder", "decoder", "layer"}
    for (
        name,
        value,
    ) in exported.state_dict().items():  # rank 2: of biases nothing, of the transposed convolution neither
        change = (value - base[name]).flatten(1) if value.ndim > 1 else value - base[name]
        if name.startswith("layer."):
            continue
        if value.ndim == 1 or name == "decoder.2.weight":
            assert not change.any(), name
        else:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name


def test_adapters_begin_as_the_base_and_depend_on_the_seed_alone():
    names = []
    x = torch.rand(1, 3, 32, 32)
    base = build_autoencoder("tiny-kl-f2", seed=0)
    for seed in (0, 0, 1):
        autoencoder = copy.deepcopy(base)
        add_adapters(autoencoder, 4, seed=seed)
        torch.testing.assert_close(autoencoder.encode(x).mean, base.encode(x).mean, rtol=0, atol=0)
        names.append(torch.cat([each.flatten() for each in trained_parameters(autoencoder)]))
    assert names[0].equal(names[1])
    assert not names[0].equal(names[2])
    assert merged(autoencoder).fingerprint() == base.fingerprint()


def test_a_run_is_exported_for_diffusers_and_resumes(configure):
    """Two steps are one, a new session, and one more."""
    from diffusers import AutoencoderKL

    whole, parts = (configure(name, lora_rank=2, lr_scheduler="constant") for name in ("whole", "parts"))
    finetune(whole)
    finetune(change_flat(parts, max_steps=1))
    with pytest.raises(UserError, match="--lora-rank 2, not 4"):
        finetune(change_flat(parts, lora_rank=4))
    finetune(parts)
    for one, other in zip(*(read_tensors(each.out / "checkpoint.safetensors")[0].items() for each in (parts, whole)),
                          strict=True):  # fmt: skip
        assert one[0] == other[0]
        assert one[1].equal(other[1]), one[0]
    exported = load_autoencoder(str(whole.out))
    loaded = AutoencoderKL.from_pretrained(whole.out / "autoencoder")
    assert loaded.state_dict().keys() == load_autoencoder("tiny-kl").model.state_dict().keys()
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded.encode(x).latent_dist.mean, exported.encode(x).mode())


def test_an_encoder_trained_alone_leaves_decoder_and_its_last_layer(small_autoencoder):
    base = copy.deepcopy(small_autoencoder.state_dict())
    state, records = take_steps(small_autoencoder, freeze_decoder=True, discriminator_warmup_steps=0)
    assert moved(state, base) == {"encoder"}
    assert all(record.adaptive_weight > 0 for record in records)
    assert all(parameter.grad is None for parameter in small_autoencoder.decoder_parameters())
    before = {name: value.clone() for name, value in state.discriminator.state_dict().items()}
    assert any(not value.equal(before[name]) for name, value in take_steps(type(small_autoencoder)())[0]
               .discriminator.state_dict().items())  # fmt: skip


def test_the_adaptive_weight_is_that_of_a_trained_decoder(small_autoencoder):
    """lambda_gan and the encoder's gradient are those of a step that trains both."""
    alone, both = (
        take_steps(type(small_autoencoder)(), 1, discriminator_warmup_steps=0, max_grad_norm=0.0, **changes)
        for changes in ({"freeze_decoder": True}, {})
    )
    assert alone[1][0].adaptive_weight == pytest.approx(both[1][0].adaptive_weight)
    for one, other in zip(*(state.autoencoder.encoder.parameters() for state, _ in (alone, both)), strict=True):
        torch.testing.assert_close(one, other)


def test_codes_are_trained_with_an_encoder_alone(small_discrete_autoencoder):
    base = copy.deepcopy(small_discrete_autoencoder.state_dict())
    state, _ = take_steps(small_discrete_autoencoder, freeze_decoder=True, adversarial_weight=0.0)
    assert moved(state, base) == {"encoder", "codes"}


def test_adapters_pad_as_what_they_adapt():
    autoencoder = build_autoencoder("tiny-kl", seed=0)
    set_padding_mode(autoencoder, "reflect")
    add_adapters(autoencoder, 2, seed=0)
    with torch.no_grad():
        for name, parameter in autoencoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(1))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    torch.testing.assert_close(merged(autoencoder).encode(x).mean, autoencoder.encode(x).mean, rtol=1e-4, atol=1e-5)


def test_polishing_follows_an_encoder_trained_alone(small_autoencoder):
    base = copy.deepcopy(small_autoencoder.state_dict())
    state, _ = take_steps(
        small_autoencoder, 3, max_steps=1, polish_steps=2, freeze_decoder=True, adversarial_weight=0.0
    )
    assert moved(state, base) == {"encoder", "decoder", "layer"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"freeze_encoder": True, "freeze_decoder": True}, "leave nothing to train"),
        ({"lora_rank": -1}, "--lora-rank is -1"),
    ],
)
def test_wrong_input_is_named(configure, changes, says):
    with pytest.raises(UserError, match=says):
        configure(**changes).resolved()


def test_a_plan_counts_what_is_trained(configure):
    whole, alone, lora = (
        plan(configure(**changes)) for changes in ({}, {"freeze_decoder": True}, {"lora_rank": 4})
    )  # fmt: skip
    assert whole["num_trained"] == whole["num_parameters"] > alone["num_trained"] > lora["num_trained"] > 0
    assert lora["num_parameters"] > whole["num_parameters"]
    assert alone["memory_gib"] < whole["memory_gib"]


def test_without_peft_it_is_said(small_autoencoder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'eqvae\[lora\]'"):
        add_adapters(small_autoencoder, 2, seed=0)
