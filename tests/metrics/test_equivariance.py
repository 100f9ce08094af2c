"""Equivariance error: closed forms."""

import pytest
import torch

from eqvae.metrics.per_image import equivariance_error, equivariance_figures, evaluation_transforms
from eqvae.transforms import Rotate


def test_equal_latents_have_no_error():
    z = torch.randn(3, 4, 8, 8)
    assert torch.equal(equivariance_error(z, z), torch.zeros(3))


def test_the_error_is_relative_to_the_latent_of_the_transformed_image():
    z = torch.randn(2, 4, 8, 8)
    assert torch.allclose(equivariance_error(3.0 * z, z), torch.full((2,), 4.0))
    assert torch.allclose(equivariance_error(z, 3.0 * z), torch.full((2,), 4.0 / 9.0))


def test_unrelated_latents_of_mean_zero_score_two():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 16, 64, 64, generator=generator), torch.randn(4, 16, 64, 64, generator=generator)
    assert torch.allclose(equivariance_error(a, b), torch.full((4,), 2.0), atol=0.05)


def test_an_exactly_equivariant_encoder_scores_zero_on_rotations(averaging_autoencoder):
    x = torch.rand(2, 3, 64, 64)

    def encode(x):
        return averaging_autoencoder.encode(x).mode()

    transforms = {name: tau for name, tau in evaluation_transforms().items() if isinstance(tau, Rotate)}
    errors = equivariance_figures(encode, x, encode(x), transforms)
    assert set(errors) == {f"equivariance_error_rotation_{angle}" for angle in (90, 180, 270)}
    for error in errors.values():
        assert error.max() < 1e-10


def test_a_linear_picture_is_equivariant_under_scales_too(averaging_autoencoder):
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)

    def encode(x):
        return averaging_autoencoder.encode(x).mode()

    transforms = evaluation_transforms(interpolation="bilinear")
    errors = equivariance_figures(encode, ramp, encode(ramp), transforms)
    assert errors["equivariance_error_scale_0.5"].item() == pytest.approx(0.0, abs=1e-10)


def test_evaluation_transforms_are_named_as_metrics_json_names_them():
    assert list(evaluation_transforms()) == [
        "rotation_90", "rotation_180", "rotation_270", "scale_0.25", "scale_0.5", "scale_0.75",
    ]  # fmt: skip


def test_tokens_are_compared_after_quantization(small_discrete_autoencoder):
    autoencoder = small_discrete_autoencoder

    def encode(x):
        return autoencoder.encode(x).mode()

    def tokenize(z):
        return autoencoder.quantize(z).tokens

    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    figures = equivariance_figures(encode, x, encode(x), evaluation_transforms(), tokenize=tokenize)
    tau = Rotate(1)
    agree = tokenize(tau(encode(x))) == tokenize(encode(tau(x)))
    assert torch.equal(figures["token_agreement_rotation_90"], agree.double().mean((1, 2)))
    assert 0.0 < figures["token_agreement_rotation_90"].mean() < 1.0
    assert [name.split("_")[0] for name in figures].count("token") == 6


def test_tokens_of_an_equivariant_encoder_agree(averaging_autoencoder):
    def encode(x):
        return averaging_autoencoder.encode(x).mode()

    def tokenize(z):
        return (z.mean(1) * 100).round().long()

    x = torch.randint(-4, 5, (2, 3, 8, 8)).repeat_interleave(8, -1).repeat_interleave(8, -2) / 4
    transforms = {name: tau for name, tau in evaluation_transforms().items() if isinstance(tau, Rotate)}
    figures = equivariance_figures(encode, x, encode(x), transforms, tokenize=tokenize)
    for name in transforms:
        assert torch.equal(figures[f"token_agreement_{name}"], torch.ones(2, dtype=torch.float64))
