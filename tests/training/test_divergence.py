"""What is usual of a loss: jumps are told once, explosions and what is not finite end the step, by name."""

import math

import pytest
import torch

from eqvae.errors import NotFiniteError
from eqvae.training.divergence import Guard


def noisy(num_steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (1.0 + 0.1 * torch.randn(num_steps, generator=generator)).tolist()


def look(guard: Guard, value: float, **others: float) -> bool:
    guard.check({**others, "loss": value}, loss="loss", exploding=("loss", "kl"))
    return guard.jump is not None


def test_noise_is_no_jump():
    guard = Guard()
    assert not any(look(guard, value) for value in noisy(2000))


def test_a_falling_loss_is_no_jump():
    guard = Guard()
    assert not any(look(guard, 100.0 / (1 + step)) for step in range(2000))


def test_a_jump_is_told_once_until_the_loss_has_come_back():
    guard = Guard()
    for value in noisy(100):
        look(guard, value)
    told = [look(guard, value) for value in (5.0, 6.0, 5.0, 1.0, 1.1, 7.0)]
    assert told == [True, False, False, False, False, True]
    assert guard.jump.loss == 7.0
    assert guard.jump.median == pytest.approx(1.0, abs=0.05)
    assert str(guard.jump).startswith("the loss jumped to 7, 6.9")


def test_the_first_steps_may_do_anything():
    guard = Guard()
    assert not any(look(guard, value) for value in (1.0, 900.0, 1.0, 50.0) * 4)


def test_an_explosion_ends_the_step_before_it_becomes_usual():
    guard = Guard()
    for value in noisy(30):
        look(guard, value, kl=2.0)
    for _ in range(2):
        with pytest.raises(
            NotFiniteError, match="kl 2, loss 5000: it began with the loss, which is 1,000 times"
        ) as caught:
            look(guard, 5000.0, kl=2.0)
        assert (caught.value.began, caught.value.terms) == ("loss", {"kl": 2.0, "loss": 5000.0})
    assert not look(guard, 1.0, kl=2.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_term_that_is_not_finite_began_it(value: float):
    with pytest.raises(NotFiniteError, match="it began with the kl, which is the first"):
        look(Guard(), value, reconstruction=1.0, kl=value)


def test_a_term_that_is_always_zero_does_not_explode():
    guard = Guard()
    for value in noisy(30):
        look(guard, value, kl=0.0)
    assert not look(guard, 1.0, kl=1e-3)
