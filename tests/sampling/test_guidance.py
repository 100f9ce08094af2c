"""Guidance: closed forms with predictions that can be written down, and no cost where nothing is guided."""

import pytest
import torch

from eqvae.errors import UserError
from eqvae.sampling.guidance import autoguidance, classifier_free_guidance

NULL = 10


class Recorder:
    """Predicts `(1 + label) z + t`, twice the channels where it learns variances; remembers its batch sizes."""

    def __init__(self, factor: float = 1.0, learn_variance: bool = False) -> None:
        self.factor, self.learn_variance, self.batch_sizes = factor, learn_variance, []

    def __call__(self, z, t, labels):
        self.batch_sizes.append(len(z))
        output = self.factor * (1 + labels).to(z.dtype)[:, None, None, None] * z + t[:, None, None, None]
        return torch.cat([output, -output], dim=1) if self.learn_variance else output


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 2, generator=generator), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1, 2, 3])


def test_scale_one_is_the_prediction_itself():
    predict = Recorder()
    assert classifier_free_guidance(predict, 1.0, NULL) is predict
    assert autoguidance(predict, Recorder(), 1.0) is predict


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_all_channels_are_guided_in_one_batched_call(batch, scale):
    z, t, labels = batch
    predict = Recorder()
    output = classifier_free_guidance(predict, scale, NULL)(z, t, labels)
    assert predict.batch_sizes == [6]
    conditional, null = predict(z, t, labels), predict(z, t, torch.full_like(labels, NULL))
    torch.testing.assert_close(output, null + scale * (conditional - null))


def test_three_channels_are_the_published_habit(batch):
    z, t, labels = batch
    predict = Recorder()
    published = classifier_free_guidance(predict, 4.0, NULL, channels=3)(z, t, labels)
    full = classifier_free_guidance(predict, 4.0, NULL)(z, t, labels)
    assert torch.equal(published[:, :3], full[:, :3])
    assert torch.equal(published[:, 3:], predict(z, t, labels)[:, 3:])


@pytest.mark.parametrize("channels", [None, 3])
def test_learned_variances_are_the_conditionals(batch, channels):
    z, t, labels = batch
    predict = Recorder(learn_variance=True)
    output = classifier_free_guidance(predict, 4.0, NULL, channels=channels)(z, t, labels)
    conditional = predict(z, t, labels)
    assert torch.equal(output[:, 4:], conditional[:, 4:])
    plain = classifier_free_guidance(Recorder(), 4.0, NULL, channels=channels)(z, t, labels)
    assert torch.equal(output[:, :4], plain)


def test_outside_of_the_interval_nothing_changes_and_nothing_is_paid(batch):
    z, t, labels = batch
    predict = Recorder()
    output = classifier_free_guidance(predict, 4.0, NULL, interval=(0.91, 1.0))(z, t, labels)
    assert predict.batch_sizes == [3]
    assert torch.equal(output, predict(z, t, labels))


def test_each_image_is_guided_at_its_own_time(batch):
    z, t, labels = batch
    predict = Recorder()
    output = classifier_free_guidance(predict, 4.0, NULL, interval=(0.5, 0.7))(z, t, labels)
    assert predict.batch_sizes == [4]
    full = classifier_free_guidance(predict, 4.0, NULL)(z, t, labels)
    plain = predict(z, t, labels)
    assert torch.equal(output[1], full[1])
    assert torch.equal(output[[0, 2]], plain[[0, 2]])


def test_an_interval_that_holds_all_times_equals_none(batch):
    everywhere = classifier_free_guidance(Recorder(), 2.0, NULL, interval=(0.0, 1.0))(*batch)
    assert torch.equal(everywhere, classifier_free_guidance(Recorder(), 2.0, NULL)(*batch))


def test_integer_times_are_compared_too(batch):
    z, _, labels = batch
    t = torch.tensor([10, 500, 999])
    predict = Recorder()
    classifier_free_guidance(predict, 2.0, NULL, interval=(0.0, 500.0))(z, t, labels)
    assert predict.batch_sizes == [5]


def test_sixteen_bits_are_mixed_in_thirty_two(batch):
    z, t, labels = batch

    def predict(z, t, labels):
        return Recorder()(z, t, labels).bfloat16()

    output = classifier_free_guidance(predict, 1.5, NULL)(z, t, labels)
    conditional, null = predict(z, t, labels).float(), predict(z, t, torch.full_like(labels, NULL)).float()
    assert output.dtype == torch.float32
    assert torch.equal(output, null + 1.5 * (conditional - null))


def test_autoguidance_extrapolates_from_the_weak_model(batch):
    z, t, labels = batch
    strong, weak = Recorder(learn_variance=True), Recorder(factor=0.5)
    output = autoguidance(strong, weak, 3.0)(z, t, labels)
    a, b = strong(z, t, labels), weak(z, t, labels)
    torch.testing.assert_close(output[:, :4], b + 3.0 * (a[:, :4] - b))
    assert torch.equal(output[:, 4:], a[:, 4:])


def test_the_weak_model_is_asked_inside_of_the_interval_only(batch):
    z, t, labels = batch
    strong, weak = Recorder(), Recorder(factor=0.5)
    guided = autoguidance(strong, weak, 3.0, interval=(0.5, 0.7))
    output = guided(z, t, labels)
    assert (strong.batch_sizes, weak.batch_sizes) == ([3], [1])
    assert torch.equal(output[[0, 2]], strong(z, t, labels)[[0, 2]])
    guided(z, t + 1.0, labels)
    assert weak.batch_sizes == [1]


@pytest.mark.parametrize("wrap", [classifier_free_guidance, autoguidance])
@pytest.mark.parametrize(("settings", "name"), [({"interval": (0.7, 0.3)}, "interval"), ({"channels": 0}, "channels")])
def test_wrong_settings_are_named(wrap, settings, name):
    predict = Recorder()
    with pytest.raises(UserError, match=name):
        if wrap is autoguidance:
            wrap(predict, predict, 2.0, **settings)
        else:
            wrap(predict, 2.0, NULL, **settings)
