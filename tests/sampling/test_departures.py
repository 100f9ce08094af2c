"""What outside code does otherwise: strided steps (DiT), shifted times (LightningDiT), Heun in an interval (REPA)."""

import pytest
import torch

from eqvae.errors import UserError
from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.generators.interpolant import Interpolant
from eqvae.sampling.guidance import classifier_free_guidance
from eqvae.sampling.noise import ImageNoise
from eqvae.sampling.ode import euler, heun, shifted_times


@pytest.mark.parametrize("num_steps", [1, 2, 10, 25, 50, 250, 500, 1000])
def test_strided_steps_begin_at_the_first_and_keep_their_distance(num_steps: int) -> None:
    taken = GaussianDiffusion().respaced(num_steps, "ddim").timesteps
    assert taken.tolist() == list(range(0, 1000, 1000 // num_steps))
    if num_steps not in (1, 1000):
        assert not torch.equal(taken, GaussianDiffusion().respaced(num_steps).timesteps)


def test_counts_that_no_stride_takes_are_refused() -> None:
    with pytest.raises(UserError, match="no whole stride takes 300 of 1000 steps. 334 are near"):
        GaussianDiffusion().respaced(300, "ddim")


@pytest.mark.parametrize("time_of_data", [0, 1])
def test_shifted_times_follow_the_formula_from_noise_to_data(time_of_data: int) -> None:
    interpolant = Interpolant(path="linear", prediction="velocity", time_of_data=time_of_data)
    times = shifted_times(interpolant, 4, 0.3)
    shares = [0.3 * p / (1 - 0.7 * p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert times == pytest.approx(shares if time_of_data == 1 else [1 - share for share in shares])
    assert shifted_times(interpolant, 4) == torch.linspace(1 - time_of_data, time_of_data, 5).tolist()


def test_a_shift_moves_the_steps_and_not_the_end() -> None:
    interpolant = Interpolant(path="linear", prediction="velocity", time_of_data=1)
    labels, seen = torch.zeros(1, dtype=torch.int64), []

    def predict(z: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(float(t[0]))
        return torch.ones_like(z)

    noise = lambda: ImageNoise(0, [0], (1, 2, 2), device=torch.device("cpu"))  # noqa: E731
    shifted = euler(predict, noise(), labels, interpolant, num_steps=4, timestep_shift=0.3)
    assert seen == pytest.approx(shifted_times(interpolant, 4, 0.3)[:-1])
    torch.testing.assert_close(shifted, euler(predict, noise(), labels, interpolant, num_steps=4))


def test_both_slopes_of_heuns_step_are_guided_if_the_first_is() -> None:
    """Steps of 0.25 from noise at t = 1, guided in [0.5, 1]: the step from 0.5 to 0.25 as a whole, the next not."""
    interpolant = Interpolant(path="linear", prediction="velocity", time_of_data=0)
    asked: list[tuple[float, int]] = []

    def predict(z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        asked.append((round(float(t[0]), 3), len(labels)))
        return torch.zeros_like(z)

    guided = classifier_free_guidance(predict, 2.0, 7, interval=(0.5, 1.0))
    noise = ImageNoise(0, [0], (1, 2, 2), device=torch.device("cpu"))
    heun(guided, noise, torch.zeros(1, dtype=torch.int64), interpolant, num_steps=4)
    assert asked == [(1.0, 2), (0.75, 2), (0.75, 2), (0.5, 2), (0.5, 2), (0.25, 2), (0.25, 1)]
