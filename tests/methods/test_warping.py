"""Rotations by any angle and shifts: where they should be exact, they are."""

import pytest
import torch

from eqvae.methods.warping import Motion
from eqvae.transforms import Rotate


def picture(height: int = 6, width: int = 6) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_those_of_the_paper(turns: int):
    x = picture()
    torch.testing.assert_close(Motion(degrees=90.0 * turns)(x), Rotate(turns)(x), atol=1e-5, rtol=0.0)


def test_half_a_turn_of_a_frame_that_is_no_square():
    x = picture(4, 10)
    torch.testing.assert_close(Motion(degrees=180.0)(x), Rotate(2)(x), atol=1e-5, rtol=0.0)


def test_angles_are_those_of_the_picture_and_not_of_its_frame():
    """In a frame that is twice as wide as high a point goes where its angle says."""
    y, x = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(80.0) - 39.5, indexing="ij")
    spot = torch.exp(-((x - 12.0).square() + y.square()) / 8.0)[None, None]
    turned = Motion(degrees=60.0)(spot)[0, 0]
    assert turned[9, 45] > 0.9, "at 6 to the right of the centre and 10.4 above it: counter-clockwise"


def test_shifts_by_whole_cells_move_them_and_reflect_at_the_border():
    x = picture(4, 8)
    moved = Motion(right=0.25, down=-0.25)(x)
    torch.testing.assert_close(moved[..., :3, 2:], x[..., 1:, :-2], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(moved[..., :3, :2], x[..., 1:, :2].flip(-1), atol=1e-5, rtol=0.0)


def test_it_rotates_first_and_says_what_it_does():
    x = picture()
    both = Motion(degrees=90.0, right=1.0 / 3.0)
    torch.testing.assert_close(both(x), Motion(right=1.0 / 3.0)(Rotate(1)(x)), atol=1e-5, rtol=0.0)
    assert str(both) == "shift (0.333, 0) · 90°"
    assert str(Motion()) == "identity"
    torch.testing.assert_close(Motion()(x), x, atol=1e-6, rtol=0.0)
