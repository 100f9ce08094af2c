"""Label rules: functions of the image's index."""

import pytest
import torch

from eqvae.errors import UserError
from eqvae.sampling.labels import balanced_labels, listed_labels, random_labels


def test_any_prefix_is_balanced_but_for_one_image():
    labels = balanced_labels(range(1000), 7)
    for length in (1, 6, 7, 8, 500, 1000):
        counts = torch.bincount(labels[:length], minlength=7)
        assert counts.max() - counts.min() <= 1


def test_labels_depend_on_the_index_alone():
    indices = [12, 3, 7]
    assert balanced_labels(indices, 5).tolist() == [2, 3, 2]
    whole = random_labels(4, range(13), 10)
    assert torch.equal(random_labels(4, indices, 10), whole[indices])
    assert listed_labels(indices, [8, 1], 10).tolist() == [8, 1, 1]


def test_random_labels_are_uniform_and_follow_the_seed():
    labels = random_labels(0, range(2000), 4)
    assert torch.bincount(labels, minlength=4).sub(500).abs().max() < 80
    assert (labels == random_labels(1, range(2000), 4)).double().mean() == pytest.approx(0.25, abs=0.05)


def test_an_unconditional_generator_gets_its_null_class():
    assert balanced_labels(range(3), 0).tolist() == [0, 0, 0]
    assert random_labels(0, range(3), 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("classes", "num_classes", "message"),
    [
        ([], 10, "empty.*0 to 9"),
        ([3, 10], 10, "Class 10 is not one.*0 to 9"),
        ([-1], 10, "Class -1"),
        ([0], 0, "unconditional"),
    ],
)
def test_wrong_lists_are_named(classes, num_classes, message):
    with pytest.raises(UserError, match=message):
        listed_labels(range(4), classes, num_classes)
