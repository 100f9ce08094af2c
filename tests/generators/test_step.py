"""One optimizer step: accumulation, averages, warm-up, clipping, NaN, label dropout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eqvae.errors import NotFiniteError
from eqvae.generators.diffusion import DiffusionObjective, GaussianDiffusion
from eqvae.generators.interpolant import InterpolantObjective
from eqvae.generators.protocol import Objective
from eqvae.runs.train_config import TrainConfig
from eqvae.training.generator_step import TrainingBatch, TrainState, build_state, train_step

CONFIG = TrainConfig(
    recipe="sit-ti-2", latents=Path("none"), out=Path("none"), batch_size=8, precision="fp32", learning_rate=1e-3
).resolved()

SIT = InterpolantObjective(num_classes=5, doubled_output=True)
DIT = DiffusionObjective(num_classes=5, diffusion=GaussianDiffusion(), label_dropout=0.1)


@pytest.fixture
def build(build_transformer):
    """Builds the state before the first step, always with the same weights."""

    def state(config: TrainConfig = CONFIG, objective: Objective = SIT) -> TrainState:
        return build_state(build_transformer(), objective, config, torch.device("cpu"))

    return state


def batch_of(state: TrainState, num: int = 8, seed: int = 0) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    latents = state.transformer.config.latents
    return TrainingBatch(
        latents=torch.randn(num, *latents.shape, generator=generator),
        labels=torch.randint(5, (num,), generator=generator),
        draws=state.learner.objective.draw(num, latents, generator),
    )


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.transformer.state_dict().items()}


def step(state: TrainState, config: TrainConfig = CONFIG, batch: TrainingBatch | None = None) -> dict[str, Tensor]:
    return train_step(state, batch_of(state) if batch is None else batch, config, state.learner)


@pytest.mark.parametrize("objective", [SIT, DIT], ids=["sit", "dit"])
@pytest.mark.parametrize("num_parts", [2, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(build, objective: Objective, num_parts: int):
    whole, parts = build(objective=objective), build(objective=objective)
    figures = step(whole)
    accumulated = step(parts, replace(CONFIG, gradient_accumulation_steps=num_parts))
    for name in figures:
        torch.testing.assert_close(accumulated[name], figures[name], rtol=1e-6, atol=1e-6)
    for one, other in zip(whole.transformer.parameters(), parts.transformer.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)


def test_the_step_is_adamws(build):
    config = replace(CONFIG, weight_decay=0.1)
    state, twin = build(config), build(config)
    optimizer = torch.optim.AdamW(
        twin.transformer.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, foreach=False, fused=False
    )
    for seed in range(3):
        batch = batch_of(twin, seed=seed)
        optimizer.zero_grad()
        twin.learner(batch.latents, batch.labels, batch.draws)["loss"].mean().backward()
        optimizer.step()
        step(state, config, batch)
    for name, value in weights(twin).items():
        # Softmax ignores the keys' biases: their gradient is rounding, which Adam blows up to whole steps.
        seen = torch.cat([value[:24], value[48:]]) if name.endswith("qkv.bias") else value
        own = state.transformer.state_dict()[name]
        own = torch.cat([own[:24], own[48:]]) if name.endswith("qkv.bias") else own
        torch.testing.assert_close(own, seen, rtol=1e-5, atol=1e-5)


def test_averaged_weights(build):
    config = replace(CONFIG, ema_decay=0.75, posthoc_ema=True)
    state = build(config)
    expected = weights(state)
    for seed in range(3):
        step(state, config, batch_of(state, seed=seed))
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in weights(state).items()}
    for name, value in state.average.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert state.power_averages is not None
    assert state.power_averages.num_updates == state.step == 3


def test_warm_up(build):
    config = replace(CONFIG, lr_warmup_steps=4)
    state, rates = build(config), []
    for _ in range(6):
        step(state, config)
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def gradient_norm(state: TrainState) -> Tensor:
    gradients = [parameter.grad for parameter in state.transformer.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients]).norm()


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_clipping(build, limit: float):
    state = build()
    figures = step(state, replace(CONFIG, max_grad_norm=limit))
    assert figures["gradient_norm"] > 0.1  # as it was before
    expected = limit if limit == 0.01 else figures["gradient_norm"]
    assert float(gradient_norm(state)) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_the_state_untouched(build, value: float):
    config = replace(CONFIG, posthoc_ema=True, max_grad_norm=1.0)
    state = build(config)
    step(state, config)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    batch = batch_of(state)
    batch.latents[3, 0, 0, 0] = value
    with pytest.raises(NotFiniteError, match="loss (nan|inf)"):
        step(state, config, batch)
    after = state.tensors()
    assert state.step == 1
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("objective", [SIT, DIT], ids=["sit", "dit"])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_label_dropout(build, objective: Objective, dropout: float):
    state = build(objective=replace(objective, label_dropout=dropout))
    batch = batch_of(state)
    other = replace(batch, labels=(batch.labels + 1) % 5)
    with torch.no_grad():
        losses = [state.learner(one.latents, one.labels, one.draws)["loss"] for one in (batch, other)]
    assert torch.equal(*losses) == (dropout == 1.0)


def test_a_checkpoint_holds_all_that_the_next_step_depends_on(build):
    config = replace(CONFIG, posthoc_ema=True, lr_warmup_steps=3)
    straight, resumed = build(config), build(config)
    for seed in range(2):
        step(straight, config, batch_of(straight, seed=seed))
    saved = {name: tensor.clone() for name, tensor in straight.tensors().items()}
    step(straight, config, batch_of(straight, seed=2))
    resumed.load(saved, 2)
    step(resumed, config, batch_of(resumed, seed=2))
    expected, found = straight.tensors(), resumed.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
