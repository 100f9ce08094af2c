"""The objective: Equation 5 reduces to Equation 1, its gradients are those of the plain formula."""

import pytest
import torch

from eqvae.equivariance import eq_vae_loss
from eqvae.losses.adversarial import build_discriminator
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.transforms import IDENTITY, Compose, Rotate, TransformSampler


def l1(target, reconstruction):
    return (target - reconstruction).abs().flatten(1).sum(1)


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def test_with_the_identity_it_is_the_standard_objective(small_autoencoder, x, noise):
    objective = eq_vae_loss(small_autoencoder, x, IDENTITY, noise, reconstruction_loss=l1)
    posterior = small_autoencoder.encode(x)
    reconstruction = small_autoencoder.decode(posterior.sample(noise))
    assert torch.equal(objective.target, x)
    assert torch.equal(objective.reconstruction, l1(x, reconstruction))
    assert torch.equal(objective.regularization, posterior.kl())


def test_an_equivariant_autoencoder_pays_nothing_more_for_rotations(averaging_autoencoder, x):
    noise = torch.zeros(2, 3, 8, 8)
    plain = eq_vae_loss(averaging_autoencoder, x, IDENTITY, noise, reconstruction_loss=l1)
    for turns in (1, 2, 3):
        turned = eq_vae_loss(averaging_autoencoder, x, Rotate(turns), noise, reconstruction_loss=l1)
        assert torch.allclose(turned.reconstruction, plain.reconstruction, rtol=1e-5)


def test_target_and_reconstruction_meet_for_every_draw(small_autoencoder, x, noise):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        draw = TransformSampler(equivariance_probability=1.0, scale="anisotropic").draw((16, 16), generator)
        objective = eq_vae_loss(small_autoencoder, x, draw.tau, noise, reconstruction_loss=l1)
        assert objective.target.shape == objective.decoded.shape


@pytest.mark.parametrize("tau", [IDENTITY, Compose(Rotate(1))])
def test_gradients_without_an_adversary_are_those_of_the_sum(small_autoencoder, x, noise, tau):
    objective = eq_vae_loss(small_autoencoder, x, tau, noise, reconstruction_loss=l1)
    regularization = 1e-3 * objective.regularization.mean()
    objective.backward(
        small_autoencoder.layer.weight, adversarial_weight=0.0, regularization=regularization, factor=0.5
    )
    ours = gradients(small_autoencoder)
    small_autoencoder.zero_grad()

    posterior = small_autoencoder.encode(x)
    decoded = small_autoencoder.decode(tau(posterior.sample(noise)))
    (0.5 * (l1(tau(x), decoded).mean() + 1e-3 * posterior.kl().mean())).backward()
    for name, gradient in gradients(small_autoencoder).items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-6), name


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(small_autoencoder, x, noise):
    discriminator = build_discriminator(0).eval()
    objective = eq_vae_loss(small_autoencoder, x, Rotate(1), noise, reconstruction_loss=l1, discriminator=discriminator)
    weight = objective.backward(small_autoencoder.layer.weight, adversarial_weight=0.5,
        regularization=0.0 * objective.regularization.mean(), factor=1.0,
    )  # fmt: skip
    ours = gradients(small_autoencoder)
    small_autoencoder.zero_grad()

    # LDM's way: two gradients through the whole loss, then one backward pass of the weighted sum.
    decoded = small_autoencoder.decode(Rotate(1)(small_autoencoder.encode(x).sample(noise)))
    reconstruction, adversarial = l1(Rotate(1)(x), decoded).mean(), -discriminator(decoded).mean()
    last = small_autoencoder.layer.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    expected = 0.5 * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
    assert weight.item() == pytest.approx(expected.item(), rel=1e-4)
    (reconstruction + expected.detach() * adversarial).backward()
    for name, gradient in gradients(small_autoencoder).items():
        assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-4), name


def test_encodes_and_decodes_once(small_autoencoder, x, noise, monkeypatch):
    calls = []
    encode, decode = small_autoencoder.encode, small_autoencoder.decode
    monkeypatch.setattr(small_autoencoder, "encode", lambda x: calls.append("encode") or encode(x))
    monkeypatch.setattr(small_autoencoder, "decode", lambda z: calls.append("decode") or decode(z))
    discriminator = build_discriminator(0)
    eq_vae_loss(small_autoencoder, x, Rotate(1), noise, reconstruction_loss=l1, discriminator=discriminator)
    assert calls == ["encode", "decode"]


def test_losses_are_summed_over_pixels_as_in_ldm():
    target, reconstruction = torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.25)
    assert torch.allclose(ReconstructionLoss("none", 1.0)(target, reconstruction), torch.full((2,), 0.25 * 3 * 64 * 64))
    loss = ReconstructionLoss("efficientnet-lite0", 2.0)
    distance = loss.distance(target, reconstruction)
    expected = (0.25 + 2.0 * distance) * 3 * 64 * 64
    assert torch.allclose(loss(target, reconstruction), expected, rtol=1e-5)


def test_perceptual_distance_of_equal_images_is_zero_and_grows_with_damage():
    from eqvae.images import adm_crop, open_images, to_images

    photo = to_images([adm_crop(open_images("photos", split="evaluation").read(0), 128)])
    distance = ReconstructionLoss("efficientnet-lite0", 1.0).distance
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(photo.shape, generator=generator)
    values = [distance(photo, photo + strength * noise).item() for strength in (0.0, 0.05, 0.1, 0.2, 0.4)]
    assert values[0] == 0.0
    assert values == sorted(values)
    assert values[-1] > 0.1
