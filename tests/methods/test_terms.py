"""Terms: zero where their theory says so, NumPy in float64 elsewhere, gradients where they should arrive."""

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

from eqvae.autoencoders.protocol import Posterior
from eqvae.losses.reconstruction import ReconstructionLoss
from eqvae.methods import METHODS, Batch, Drawn, Encoded, Term, parse_method
from eqvae.methods.warping import shift_by_phase
from eqvae.runtime.run_folder import from_flat
from eqvae.runtime.seeds import generator_for
from eqvae.training.autoencoder_config import AutoencoderTraining
from eqvae.training.autoencoder_state import build_state
from eqvae.training.autoencoder_step import train_step

TERMS = [name for name, kind in METHODS.items() if issubclass(kind, Term)]


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def read(text: str) -> Term:
    (part,) = parse_method(text)
    assert isinstance(part.method, Term)
    return part.method


def see(text: str, autoencoder, x, z=None, *, drawn=None, part=None, seed: int = 0) -> tuple[Term, Encoded]:
    """A term, and what it sees of a step."""
    term = read(text)
    posterior = autoencoder.encode(x)
    if drawn is None:
        drawn = term.draw(
            Batch(
                x=x, stride=autoencoder.stride, latent_channels=autoencoder.latent_channels,
                generator=torch.Generator().manual_seed(seed),
            )
        )  # fmt: skip
    part = term.build(autoencoder, image_size_px=x.shape[-1]) if part is None else part
    z = posterior.mode() if z is None else z
    return term, Encoded(autoencoder=autoencoder, x=x, posterior=posterior, z=z, drawn=drawn, part=part)


def value(text: str, autoencoder, x, z=None, **given) -> torch.Tensor:
    term, encoded = see(text, autoencoder, x, z, **given)
    return term.value(encoded)


# Zero ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TERMS)
def test_terms_take_rectangles(small_autoencoder, name):
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert bool(value(name, small_autoencoder, x).isfinite().all())


def test_the_divergence_of_a_standard_normal_posterior_is_zero(small_autoencoder, x):
    term, encoded = see("kl", small_autoencoder, x)
    posterior = Posterior(mean=torch.zeros(2, 4, 8, 8), log_variance=torch.zeros(2, 4, 8, 8))
    seen = Encoded(**{**vars(encoded), "posterior": posterior})
    assert term.value(seen).tolist() == [0.0, 0.0]


def test_an_averaging_autoencoder_is_equivariant(averaging_autoencoder, x):
    text = "explicit(transforms=rotation, equivariance_probability=1)"
    assert value(text, averaging_autoencoder, x).max() < 1e-8
    whole_cells = Batch(x=x, stride=8, latent_channels=3, generator=torch.Generator())
    for down, right in ((8, -16), (0, 24), (-8, 0)):
        steps = iter((down, right))
        object.__setattr__(whole_cells, "choose", lambda options, steps=steps: next(steps))
        drawn = read("af").draw(whole_cells)
        assert drawn.name == f"shift ({down}, {right}) px"
        assert value("af", averaging_autoencoder, x, drawn=drawn).max() < 1e-6


def test_other_terms_are_zero_where_their_theory_says_so(small_autoencoder, x):
    blurred = scipy.ndimage.convolve1d(x.double().numpy(), _gaussian(), axis=-1, mode="constant")
    blurred = scipy.ndimage.convolve1d(blurred, _gaussian(), axis=-2, mode="constant")
    small = torch.nn.functional.interpolate(torch.from_numpy(blurred).float(), (16, 16), mode="bicubic")
    assert value("esm(delta=0)", small_autoencoder, x, small).abs().max() < 1e-2  # of 12,288 times a divergence
    assert value("esm", small_autoencoder, x, small).min() > 1.0
    alike = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, -1)
    assert value("lcr", small_autoencoder, x, alike.repeat_interleave(2, -2)).tolist() == [0.0, 0.0]
    assert value("tv", small_autoencoder, x, torch.ones(2, 4, 16, 16)).tolist() == [0.0, 0.0]


def test_latents_that_are_the_teachers_tokens_are_aligned(small_autoencoder, x):
    from eqvae.artifacts.records import to_uint8

    term = read("vf")
    part = term.build(small_autoencoder, image_size_px=64)
    tokens = part.teacher(to_uint8(x)).transpose(1, 2).unflatten(2, (4, 4))
    part.convolution = torch.nn.Identity()
    assert value("vf", small_autoencoder, x, tokens, part=part).max() < 1e-6
    assert value("vf", small_autoencoder, x, -tokens, part=part).min() > 1.4  # opposite to each token


# NumPy --------------------------------------------------------------------------------------------------------------


def _gaussian() -> np.ndarray:
    weights = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 1.2**2))
    return weights / weights.sum()


def test_total_variation_in_numpy(small_autoencoder, x):
    z = small_autoencoder.encode(x).mode()
    expected = [
        np.abs(np.diff(each, axis=-1)).mean() + np.abs(np.diff(each, axis=-2)).mean()
        for each in z.detach().double().numpy()
    ]
    np.testing.assert_allclose(value("tv", small_autoencoder, x).detach().numpy(), expected, rtol=1e-5)


def test_local_correlation_in_numpy(small_autoencoder, x):
    expected = []
    for z in small_autoencoder.encode(x).mode().detach().double().numpy():
        found = []
        for row in range(0, 16, 2):
            for column in range(0, 16, 2):
                window = z[:, row : row + 2, column : column + 2].reshape(4, 4).T  # cells, channels
                found += list(np.corrcoef(window)[np.triu_indices(4, 1)])
        expected.append(max(0.75 - np.mean(found), 0.0))
    np.testing.assert_allclose(value("lcr", small_autoencoder, x).detach().numpy(), expected, rtol=1e-4)


def test_spectrum_matching_in_numpy(small_autoencoder, x):
    z = small_autoencoder.encode(x).mode().detach().double().numpy()
    blurred = scipy.ndimage.convolve1d(x.double().numpy(), _gaussian(), axis=-1, mode="constant")
    blurred = scipy.ndimage.convolve1d(blurred, _gaussian(), axis=-2, mode="constant")
    small = torch.nn.functional.interpolate(torch.from_numpy(blurred), (16, 16), mode="bicubic").numpy()
    radius = np.hypot(*np.mgrid[:16, :16])
    ring = np.minimum(np.floor(radius / radius.max() * 16), 15)

    def bands(values):
        energies = (scipy.fft.dctn(values, axes=(-2, -1), norm="ortho") ** 2).mean(0)
        energies[0, 0] = 0.0
        return np.array([energies[ring == band].mean() for band in range(16)])

    expected = []
    for image, latent in zip(small, z, strict=True):
        p, q = np.log1p(bands(image) * np.arange(1, 17)), np.log1p(bands(latent))
        p, q = p / p.sum(), q / q.sum()
        expected.append(3 * 64 * 64 * (p * np.log(p / q)).sum())
    np.testing.assert_allclose(value("esm", small_autoencoder, x).detach().numpy(), expected, rtol=1e-3)


def test_alignment_in_numpy(small_autoencoder, x):
    from eqvae.artifacts.records import to_uint8

    term, encoded = see("vf", small_autoencoder, x)
    f = encoded.part.teacher(to_uint8(x)).transpose(1, 2).unflatten(2, (4, 4))
    f = torch.nn.functional.interpolate(f, (16, 16), mode="bilinear").flatten(2).double().numpy()
    weight = encoded.part.convolution.weight[:, :, 0, 0].detach().double().numpy()
    z = np.einsum("dc,ncp->ndp", weight, encoded.z.flatten(2).detach().double().numpy())
    z, f = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (z, f))
    apart = np.abs(np.einsum("ndi,ndj->nij", z, z) - np.einsum("ndi,ndj->nij", f, f))
    expected = np.maximum(apart - 0.25, 0).mean((1, 2)) + np.maximum(0.5 - (z * f).sum(1), 0).mean(1)
    np.testing.assert_allclose(term.value(encoded).detach().numpy(), expected, rtol=1e-4)


def test_shift_equivariance_in_numpy(small_autoencoder, x):
    term, encoded = see("af", small_autoencoder, x, seed=2)
    down, right = (int(each) for each in encoded.drawn.name[7:-4].split(", "))
    assert down % 4 and right % 4  # parts of cells

    def moved(values, down, right):
        turns = down * np.fft.fftfreq(values.shape[-2])[:, None] + right * np.fft.fftfreq(values.shape[-1])
        return np.fft.ifft2(np.fft.fft2(values) * np.exp(-2j * np.pi * turns)).real

    z = encoded.posterior.mode().detach()
    shifted = moved(z.double().numpy(), down / 4, right / 4)
    np.testing.assert_allclose(shift_by_phase(z, down / 4, right / 4).numpy(), shifted, atol=1e-5)
    rows, columns = np.mgrid[:64, :64]
    known = (rows - down >= 0) & (rows - down < 64) & (columns - right >= 0) & (columns - right < 64)
    cells = known.reshape(16, 4, 16, 4).all((1, 3))
    with torch.no_grad():
        of_shifted = small_autoencoder.encode(torch.from_numpy(np.roll(x.numpy(), (down, right), (-2, -1)))).mean
        decoded = small_autoencoder.decode(torch.from_numpy(shifted).float()).double().numpy()
        target = np.roll(small_autoencoder.decode(z).double().numpy(), (down, right), (-2, -1))
    expected = ((cells * (of_shifted.double().numpy() - shifted)) ** 2).sum((1, 2, 3))
    expected += ((known * (decoded - target)) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(term.value(encoded).detach().numpy(), expected, rtol=1e-3)


# Gradients ----------------------------------------------------------------------------------------------------------


def reached(module, loss) -> dict[str, bool]:
    module.zero_grad(set_to_none=True)
    loss.sum().backward()
    return {
        name: any(each.grad is not None and each.grad.abs().sum() > 0 for each in getattr(module, name).parameters())
        for name in ("encoder", "decoder", "layer")
    }


@pytest.mark.parametrize("name", TERMS)
def test_gradients_arrive_where_they_should(small_autoencoder, x, name):
    text = f"{name}(equivariance_probability=1)" if name == "explicit" else name
    term, encoded = see(text, small_autoencoder, x)
    found = reached(small_autoencoder, term.value(encoded))
    decodes = name == "af"
    assert found == {"encoder": True, "decoder": decodes, "layer": decodes}
    if encoded.part is not None:
        learned = {key: each.grad is not None for key, each in encoded.part.named_parameters() if each.requires_grad}
        assert learned == {"convolution.weight": True}


def test_shift_equivariance_stops_gradients_at_z(small_autoencoder, x):
    term, encoded = see("af", small_autoencoder, x)
    term.value(encoded).sum().backward()
    ours = {name: each.grad.clone() for name, each in small_autoencoder.named_parameters()}
    small_autoencoder.zero_grad()
    drawn, z = encoded.drawn, small_autoencoder.encode(x).mode().detach()
    cells = -torch.nn.functional.max_pool2d(-drawn.mask, 4)
    apart = cells * (small_autoencoder.encode(drawn.image(x)).mean - drawn.latent(z))
    target = drawn.image(small_autoencoder.decode(z)).detach()
    (
        apart.square().sum() + (drawn.mask * (small_autoencoder.decode(drawn.latent(z)) - target)).square().sum()
    ).backward()
    for name, each in small_autoencoder.named_parameters():
        torch.testing.assert_close(ours[name], each.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_an_adaptive_weight_is_the_ratio_of_gradients_at_the_encoders_last_layer(small_autoencoder, x, num_parts):
    config = from_flat(
        AutoencoderTraining, method="plain + tv:0.3", max_steps=9, batch_size=2, adversarial_weight=0.0,
        perceptual="none", precision="fp32", max_grad_norm=0.0, ema_decay=0.0, kl_weight=1e-2,
        gradient_accumulation_steps=num_parts,
    ).resolved()  # fmt: skip
    reference = type(small_autoencoder)()
    state = build_state(small_autoencoder, config, torch.device("cpu"), image_size_px=64)
    record = train_step(state, x, config, ReconstructionLoss("none", 1.0), config.mixture())

    layer, weights = reference.encoder[-1].weight, []
    for index, part in enumerate(x.chunk(num_parts)):
        noise = torch.randn((len(part), 4, 16, 16), generator=generator_for(0, 0, index))
        posterior = reference.encode(part)
        z = posterior.sample(noise)
        l1 = (part - reference.decode(z)).abs().flatten(1).sum(1).mean()
        tv = (z.diff(dim=-1).abs().flatten(1).mean(1) + z.diff(dim=-2).abs().flatten(1).mean(1)).mean()
        norms = [torch.autograd.grad(each, layer, retain_graph=True)[0].norm() for each in (l1, tv)]
        weights.append(0.3 * norms[0] / (norms[1] + 1e-4))
        loss = l1 + 1e-2 * posterior.kl().mean() + weights[-1].detach() * tv
        (loss / (part[0].numel() * num_parts)).backward()
    assert record.terms["tv_weight"] == pytest.approx(np.mean([each.item() for each in weights]), rel=1e-3)
    for (name, ours), theirs in zip(small_autoencoder.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-7, msg=name)


def test_terms_without_a_share_in_the_step_cost_nothing(small_autoencoder, x):
    assert value("explicit(equivariance_probability=0)", small_autoencoder, x).tolist() == [0.0, 0.0]
    term, encoded = see("af", small_autoencoder, x)
    assert isinstance(encoded.drawn, Drawn)
    assert term.value(Encoded(**{**vars(encoded), "x": x[..., :32, :32]})).tolist() == [0.0, 0.0]
