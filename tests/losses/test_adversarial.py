"""The adaptive weight and the seam give LDM's gradients with one pass through the decoder; the watchdog."""

import numpy as np
import pytest
import torch

from eqvae.equivariance import decode_transformed
from eqvae.losses.adversarial import AdversarialConfig, Seam, Watchdog
from eqvae.losses.discriminators import build_discriminator
from eqvae.transforms import IDENTITY, Compose, Rotate


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


@pytest.mark.parametrize("tau", [IDENTITY, Compose(Rotate(1))])
def test_gradients_without_an_adversary_are_those_of_the_sum(small_autoencoder, x, noise, tau):
    pair = decode_transformed(small_autoencoder, x, tau, noise)
    seam = Seam.cut(pair.decoded)
    gradient, weight = seam.gradient(
        small_autoencoder.layer.weight, reconstruction=l1(pair.target, seam.image).mean(), adversarial=None,
        adversarial_weight=0.0,
    )  # fmt: skip
    assert weight == 0.0
    torch.autograd.backward([seam.decoded, 0.5e-3 * pair.posterior.kl().mean()], [0.5 * gradient, None])
    ours = gradients(small_autoencoder)
    small_autoencoder.zero_grad()

    posterior = small_autoencoder.encode(x)
    decoded = small_autoencoder.decode(tau(posterior.sample(noise)))
    (0.5 * (l1(tau(x), decoded).mean() + 1e-3 * posterior.kl().mean())).backward()
    for name, gradient in gradients(small_autoencoder).items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-6), name


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(small_autoencoder, x, noise):
    discriminator = build_discriminator(0).eval()
    pair = decode_transformed(small_autoencoder, x, Rotate(1), noise)
    seam = Seam.cut(pair.decoded)
    gradient, weight = seam.gradient(
        small_autoencoder.layer.weight, reconstruction=l1(pair.target, seam.image).mean(),
        adversarial=-discriminator(seam.image).mean(), adversarial_weight=0.5,
    )  # fmt: skip
    torch.autograd.backward(seam.decoded, gradient)
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


# The watchdog -------------------------------------------------------------------------------------------------------


def look_at(losses, window: int = 20) -> list[str]:
    watchdog = Watchdog(window)
    return [verdict for loss in losses if (verdict := watchdog.look(loss)) is not None]


def test_the_watchdog_is_silent_before_its_window_is_full():
    assert look_at([1.0] * 19) == []


def test_a_dead_discriminator_is_said_once():
    (verdict,) = look_at([1.0 + 0.001 * (-1) ** step for step in range(200)])
    assert "dead" in verdict
    assert "--discriminator FROM" in verdict
    assert "--discriminator-warmup-steps 500" in verdict


def test_a_saturated_discriminator_is_said_once():
    (verdict,) = look_at([0.001] * 200)
    assert "saturated" in verdict
    assert "--discriminator-regularization r1" in verdict


@pytest.mark.parametrize("kind", ["none", "r1"])
@pytest.mark.parametrize(("share", "is_told"), [(1.0, True), (0.6, True), (0.4, False), (0.0, False)])
def test_an_adaptive_weight_at_its_clamp_is_said_with_its_mend(share, is_told, kind):
    watchdog = Watchdog.over(AdversarialConfig(discriminator_warmup_steps=1000, discriminator_regularization=kind))
    said = [watchdog.look(0.7 + 0.1 * (step % 2), 5000.0 if step % 10 < 10 * share else 40.0) for step in range(400)]
    verdicts = [verdict for verdict in said if verdict is not None]
    assert len(verdicts) == is_told
    for verdict in verdicts:
        assert "stands at its clamp of 5,000" in verdict
        assert "--discriminator-warmup-steps 2000" in verdict  # it has had 1,000
        assert ("a lower --discriminator-regularization-weight" in verdict) == (kind == "r1")


def test_a_healthy_discriminator_is_left_in_peace():
    generator = np.random.default_rng(0)
    assert look_at(generator.uniform(0.5, 1.1, 500)) == []
    assert look_at(1.0 + generator.uniform(-0.1, 0.1, 500)) == []  # near chance, but alive


def test_a_relapse_is_said_again():
    healthy = [0.4, 0.9] * 20
    verdicts = look_at([1.0] * 40 + healthy + [0.0] * 40 + healthy + [1.0] * 40)
    assert [next(word for word in ("dead", "saturated") if word in verdict) for verdict in verdicts] == [
        "dead", "saturated", "dead",
    ]  # fmt: skip
