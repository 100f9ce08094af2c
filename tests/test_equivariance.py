"""The idea and its equations: with the identity they are the plain formulas, and all of them train."""

import os
import subprocess
import sys

import pytest
import torch

from eqvae import TransformSampler, build_autoencoder, decode_transformed, eq_vae_loss, equivariance_loss
from eqvae.equivariance import explicit_loss, vae_loss
from eqvae.errors import UserError
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


# The idea -----------------------------------------------------------------------------------------------------------


def test_with_the_identity_it_is_the_standard_objective(small_autoencoder, x, noise):
    pair = decode_transformed(small_autoencoder, x, IDENTITY, noise)
    posterior = small_autoencoder.encode(x)
    assert torch.equal(pair.target, x)
    assert torch.equal(pair.latents, posterior.sample(noise))
    assert torch.equal(pair.decoded, small_autoencoder.decode(posterior.sample(noise)))
    assert pair.quantized is None


def test_an_equivariant_autoencoder_pays_nothing_more_for_rotations(averaging_autoencoder, x):
    noise = torch.zeros(2, 3, 8, 8)
    plain = equivariance_loss(averaging_autoencoder, x, IDENTITY, noise)
    for turns in (1, 2, 3):
        turned = equivariance_loss(averaging_autoencoder, x, Rotate(turns), noise)
        assert torch.allclose(turned, plain, rtol=1e-5)


def test_target_and_reconstruction_meet_for_every_draw(small_autoencoder, x, noise):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        draw = TransformSampler(equivariance_probability=1.0, scale="anisotropic").draw((16, 16), generator)
        pair = decode_transformed(small_autoencoder, x, draw.tau, noise)
        assert pair.target.shape == pair.decoded.shape


def test_encodes_and_decodes_once(small_autoencoder, x, noise, monkeypatch):
    calls = []
    encode, decode = small_autoencoder.encode, small_autoencoder.decode
    monkeypatch.setattr(small_autoencoder, "encode", lambda x: calls.append("encode") or encode(x))
    monkeypatch.setattr(small_autoencoder, "decode", lambda z: calls.append("decode") or decode(z))
    decode_transformed(small_autoencoder, x, Rotate(1), noise)
    assert calls == ["encode", "decode"]


# What trains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [IDENTITY, Rotate(1)], ids=["identity", "rotation"])
@pytest.mark.parametrize("name", ["tiny-kl", "tiny-kl deterministic", "tiny-vq"])
def test_the_public_loss_reaches_every_parameter(name, tau, x):
    autoencoder = build_autoencoder(name.split()[0], seed=0)
    if name.endswith("deterministic"):
        encode = autoencoder.encode

        def to_point(x):
            posterior = encode(x)
            return type(posterior)(mean=posterior.mean)

        autoencoder.encode = to_point
    side = 64 // autoencoder.stride
    noise = torch.randn(2, autoencoder.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    equivariance_loss(autoencoder, x, tau, noise).mean().backward()
    assert [each for each, parameter in autoencoder.named_parameters() if parameter.grad is None] == []
    found = gradients(autoencoder)
    assert all(gradient.isfinite().all() for gradient in found.values())
    for part in ("encoder", "decoder"):
        assert any(gradient.any() for each, gradient in found.items() if part in each)


@pytest.mark.parametrize("kind", ["small_autoencoder", "small_discrete_autoencoder"])
def test_with_the_identity_value_and_gradient_are_equation_1s(kind, request, x, noise):
    autoencoder = request.getfixturevalue(kind)
    weights = {"kl_weight": 1e-2, "codebook_weight": 0.7, "commitment_weight": 0.3}
    losses = equivariance_loss(autoencoder, x, IDENTITY, noise, reconstruction_loss=l1, **weights)
    assert torch.equal(vae_loss(autoencoder, x, noise, **weights), losses)
    losses.mean().backward()
    ours = gradients(autoencoder)
    autoencoder.zero_grad()

    posterior = autoencoder.encode(x)
    z = posterior.sample(noise)
    if kind == "small_autoencoder":
        expected = l1(x, autoencoder.decode(z)) + 1e-2 * posterior.kl()
    else:
        codes = autoencoder.codebook[autoencoder.quantize(z).tokens].permute(0, 3, 1, 2)
        decoded = autoencoder.decode_quantized(z + (codes - z).detach())
        pull = 0.7 * (codes - z.detach()).square() + 0.3 * (z - codes.detach()).square()
        expected = l1(x, decoded) + x[0].numel() * pull.flatten(1).mean(1)
    torch.testing.assert_close(losses, expected)
    expected.mean().backward()
    for name, gradient in gradients(autoencoder).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("tau", [IDENTITY, Compose(Rotate(1))])
def test_equation_5_written_out(small_autoencoder, x, noise, tau):
    equivariance_loss(small_autoencoder, x, tau, noise, kl_weight=1e-3).mean().backward()
    ours = gradients(small_autoencoder)
    small_autoencoder.zero_grad()
    posterior = small_autoencoder.encode(x)
    decoded = small_autoencoder.decode(tau(posterior.sample(noise)))
    (l1(tau(x), decoded).mean() + 1e-3 * posterior.kl().mean()).backward()
    for name, gradient in gradients(small_autoencoder).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_equation_4_written_out(small_autoencoder, x):
    z = small_autoencoder.encode(x).mean
    loss = explicit_loss(small_autoencoder, x, z, Rotate(1))
    expected = (Rotate(1)(z) - small_autoencoder.encode(Rotate(1)(x)).mean).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, expected)
    stopped = explicit_loss(small_autoencoder, x, z, Rotate(1), stop_gradient=True)
    assert torch.equal(stopped, loss)
    one, other = (torch.autograd.grad(each.sum(), z, retain_graph=True)[0] for each in (loss, stopped))
    assert torch.equal(one, other)


def test_equation_7_is_equation_5_or_equation_1(small_autoencoder, x):
    for probability, seed in ((0.0, 0), (1.0, 0), (1.0, 1)):
        sampler = TransformSampler(equivariance_probability=probability)
        losses = eq_vae_loss(small_autoencoder, x, sampler, torch.Generator().manual_seed(seed), kl_weight=1e-2)
        generator = torch.Generator().manual_seed(seed)
        draw = sampler.draw((16, 16), generator)
        noise = torch.randn(2, 4, 16, 16, generator=generator)
        assert torch.equal(losses, equivariance_loss(small_autoencoder, x, draw.tau, noise, kl_weight=1e-2))
        assert (draw.branch == "plain") == (probability == 0.0)


def test_three_lines_train(small_autoencoder, x, noise):
    before = vae_loss(small_autoencoder, x, noise).mean().item()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(small_autoencoder.parameters(), lr=5e-3)
    for _ in range(40):
        loss = eq_vae_loss(small_autoencoder, x, TransformSampler(), generator).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert vae_loss(small_autoencoder, x, noise).mean().item() < 0.97 * before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_enough(dtype):
    autoencoder = build_autoencoder("tiny-kl", seed=0).to(dtype)
    x = torch.ones(1, 3, 256, 256, dtype=dtype)
    loss = eq_vae_loss(autoencoder, x, TransformSampler(), torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32 and bool(loss.isfinite().all())


def test_a_compiled_codebook_counts():
    """In a process of its own, as a user's: here, types are checked, and a wrapper has another."""
    script = """
import torch
from eqvae import TransformSampler, UserError, build_autoencoder, eq_vae_loss
autoencoder, x, sampler = build_autoencoder("tiny-vq", seed=0), torch.rand(2, 3, 32, 32), TransformSampler()
compiled = torch.compile(autoencoder, backend="eager")
losses = [eq_vae_loss(each, x, sampler, torch.Generator().manual_seed(0)) for each in (autoencoder, compiled)]
torch.testing.assert_close(*losses)
try:
    eq_vae_loss(torch.nn.DataParallel(autoencoder), x, sampler)
except UserError as error:
    print(error)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DataParallel is no eqvae.Autoencoder. Wrap a module whose forward")


def test_what_fails_far_from_here_is_refused(small_autoencoder, x):
    sampler = TransformSampler()
    with pytest.raises(UserError, match="images of 63 x 64 px have no whole cells of 4 px. Use 64 x 64"):
        eq_vae_loss(small_autoencoder, x[..., 1:, :], sampler)
