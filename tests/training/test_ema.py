"""Averages of weights: exact arithmetic, and post-hoc reconstruction against averages that were tracked."""

import numpy as np
import pytest
import torch
from torch import nn

from eqvae.errors import UserError
from eqvae.training.ema import Ema, PowerEma, find_snapshots, gamma_of, mixture_weights, reconstruct


class _Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.fixed = nn.Parameter(torch.tensor([0.1]), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))

    def set(self, *values: float) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.tensor(values))
            self.count += 1


def test_the_average_is_exact_arithmetic():
    module = _Module()
    ema = Ema(module, decay=0.75)
    module.set(5.0, 6.0)
    ema.update(module)
    assert ema.averages["weight"].tolist() == [0.75 * 1 + 0.25 * 5, 0.75 * -2 + 0.25 * 6]
    module.set(1.0, 0.0)
    ema.update(module)
    assert ema.averages["weight"].tolist() == [0.75 * 2 + 0.25 * 1, 0.75 * 0.0 + 0.25 * 0.0]
    assert ema.averages["count"].item() == 2
    assert torch.equal(ema.averages["fixed"], module.fixed)
    assert module.weight.tolist() == [1.0, 0.0]


def test_without_decay_the_average_is_the_last_weights():
    module = _Module()
    ema = Ema(module, decay=0.0)
    module.set(5.0, 6.0)
    ema.update(module)
    assert ema.weights()["weight"].tolist() == [5.0, 6.0]
    with pytest.raises(ValueError, match="decay is 1.0"):
        Ema(module, decay=1.0)


def test_constant_weights_stay_as_they_are_bit_for_bit():
    module = _Module()
    ema, power = Ema(module, decay=0.9999), PowerEma(module)
    for _ in range(100):
        ema.update(module)
        power.update(module)
    for averages in (ema.averages, *power.averages.values()):
        assert all(torch.equal(averages[name], value) for name, value in module.state_dict().items())


def test_warm_up_forgets_first_weights_sooner():
    module = _Module()
    ema, plain = Ema(module, decay=0.9, warm_up=True), Ema(module, decay=0.9)
    module.set(3.0, 3.0)
    ema.update(module)
    assert ema.averages["weight"].tolist() == [3.0, 3.0]  # nothing is left of the start
    module.set(0.0, 0.0)
    expected = 3.0
    for update in range(1, 201):
        ema.update(module)
        plain.update(module)
        expected *= min(0.9, (1 + update) / (10 + update))
        assert ema.averages["weight"][0].item() == pytest.approx(expected)
    assert plain.averages["weight"][0].item() == pytest.approx(0.9**200)


@pytest.mark.parametrize("kind", ["exponential", "power"])
def test_an_average_goes_on_where_it_stopped(kind):
    def build(module):
        return Ema(module, decay=0.9, warm_up=True) if kind == "exponential" else PowerEma(module)

    module = _Module()
    whole = build(module)
    part = build(module)
    for step in range(10):
        module.set(float(step), float(step**2))
        whole.update(module)
        part.update(module)
        if step == 4:
            state = {name: value.clone() for name, value in part.state_dict().items()}
            part = build(_Module())
            part.load_state_dict(state)
    assert part.num_updates == whole.num_updates == 10
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_gamma_gives_the_profile_its_width(sigma_rel):
    gamma = gamma_of(sigma_rel)
    # The profile (gamma + 1) s^gamma on [0, 1] has mean (gamma + 1) / (gamma + 2).
    second_moment, mean = (gamma + 1) / (gamma + 3), (gamma + 1) / (gamma + 2)
    assert np.sqrt(second_moment - mean**2) == pytest.approx(sigma_rel)


def test_published_gammas():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)
    with pytest.raises(ValueError, match="sigma_rel is 0.3"):
        gamma_of(0.3)


def test_power_averages_weigh_steps_as_powers():
    module = _Module()
    power = PowerEma(module, horizons=(0.1,))
    values = np.random.default_rng(0).normal(size=50)
    for value in values:
        module.set(value, -value)
        power.update(module)
    gamma, steps = gamma_of(0.1), np.arange(51) / 50
    weights = np.diff(steps ** (gamma + 1))
    assert weights.sum() == pytest.approx(1.0)
    assert power.averages[0.1]["weight"][0].item() == pytest.approx((weights * values).sum())


def test_a_tracked_profile_is_its_own_mixture():
    profiles = [(horizon, step) for step in (50, 100) for horizon in (0.05, 0.1)]
    assert mixture_weights(profiles, (0.1, 100)) == pytest.approx([0.0, 0.0, 0.0, 1.0], abs=1e-8)
    assert sum(mixture_weights(profiles, (0.07, 100))) == pytest.approx(1.0, abs=1e-9)
    assert mixture_weights(profiles[:1], (0.07, 100)) == pytest.approx([1.0])


@pytest.mark.parametrize(("sigma_rel", "step"), [(0.07, 2000), (0.15, 2000), (0.2, 2000), (0.05, 2000), (0.1, 1500)])
def test_any_horizon_is_reconstructed_from_two(tmp_path, sigma_rel, step):
    module, generator = _Module(), np.random.default_rng(0)
    tracked, wanted = PowerEma(module), PowerEma(module, horizons=(sigma_rel,))
    weights, expected = np.array([1.0, -2.0]), None
    for now in range(1, 2001):
        weights = weights + generator.normal(size=2) * 0.05 - 0.002 * weights
        module.set(*weights)
        tracked.update(module)
        wanted.update(module)
        if now % 125 == 0:
            tracked.write_snapshots(tmp_path)
        if now == step:
            expected = wanted.averages[sigma_rel]["weight"].clone()
    snapshots = find_snapshots(tmp_path)
    assert len(snapshots) == 2 * 16
    assert (snapshots[0].step, snapshots[0].sigma_rel) == (125, 0.05)
    rebuilt = reconstruct(snapshots, sigma_rel=sigma_rel, step=step)
    assert rebuilt["weight"].numpy() == pytest.approx(expected.numpy(), abs=0.01)
    # The average differs from the last weights by much more than that.
    assert np.abs(rebuilt["weight"].numpy() - weights).max() > 0.05
    assert rebuilt["count"].item() == step
    assert rebuilt["fixed"].tolist() == pytest.approx([0.1], rel=1e-6)
    assert rebuilt["weight"].dtype == torch.float64
    assert rebuilt["fixed"].dtype == torch.float32


def test_without_snapshots_nothing_is_reconstructed(tmp_path):
    with pytest.raises(UserError, match="no snapshots up to step 0"):
        reconstruct(find_snapshots(tmp_path), sigma_rel=0.1)


def test_a_twins_own_weights_are_the_averages():
    module, twin = _Module(), _Module()
    ema = Ema(module, decay=0.5, twin=twin)
    module.set(5.0, 6.0)
    ema.update(module)
    assert twin.weight.tolist() == [3.0, 2.0]
    ema.load_state_dict({**module.state_dict(), "num_updates": torch.tensor(4)})
    assert (twin.weight.tolist(), ema.num_updates) == ([5.0, 6.0], 4)
