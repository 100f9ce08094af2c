"""Power spectra: white noise, sinusoids, power laws, Parseval, streaming, the comparison with images."""

import math

import numpy as np
import pytest
import torch

from eqvae.images import adm_crop, open_images, to_images
from eqvae.metrics.spectrum import Spectrum, SpectrumSums, excess_db, high_frequency_excess_db, images_on_latent_grid


def radial_power_spectrum(x: torch.Tensor) -> Spectrum:
    sums = SpectrumSums()
    sums.add(x)
    return sums.spectrum()


def slope(spectrum: Spectrum) -> float:
    """Fit the exponent of a power law."""
    return float(np.polyfit(spectrum.frequency.log(), spectrum.power.log(), 1)[0])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def power_law(exponent: float, shape: tuple[int, int, int, int], seed: int = 0) -> torch.Tensor:
    """Noise whose power falls off as frequency^exponent."""
    radius = torch.hypot(torch.fft.fftfreq(shape[2])[:, None], torch.fft.fftfreq(shape[3])[None])
    radius[0, 0] = 1.0
    return torch.fft.ifft2(torch.fft.fft2(noise(*shape, seed=seed)) * radius ** (exponent / 2)).real


def test_white_noise_has_power_1_at_every_frequency():
    spectrum = radial_power_spectrum(3.0 * noise(200, 4, 32, 32) + 5.0)
    assert spectrum.power.numpy() == pytest.approx(1.0, abs=0.05)
    assert slope(spectrum) == pytest.approx(0.0, abs=0.01)
    assert spectrum.num_images == 200


@pytest.mark.parametrize(("size", "num_rings"), [((32, 32), 16), ((16, 24), 8), ((9, 15), 4), ((2, 2), 1)])
def test_frequencies_lie_in_rings_up_to_one_half(size, num_rings):
    spectrum = radial_power_spectrum(noise(2, 1, *size))
    assert len(spectrum.frequency) == num_rings
    assert 0.0 < spectrum.frequency.min() <= spectrum.frequency.max() <= 0.5
    assert bool((spectrum.frequency.diff() > 0.0).all())
    centres = torch.arange(1, num_rings + 1) / min(size)
    assert bool(((spectrum.frequency - centres).abs() <= 0.5 / min(size)).all())


@pytest.mark.parametrize(("vertical", "horizontal"), [(0, 8), (5, 0), (6, 8)])
def test_a_sinusoid_peaks_at_its_frequency(vertical, horizontal):
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    spectrum = radial_power_spectrum(torch.cos(2 * math.pi * (vertical * y + horizontal * x) / 64)[None, None])
    ring = int(spectrum.power.argmax())
    assert ring == round(math.hypot(vertical, horizontal)) - 1
    # All power is in the two conjugate frequencies of one ring.
    assert spectrum.power[ring] * spectrum.num_frequencies[ring] == pytest.approx(64 * 64)
    assert spectrum.power.sum() == pytest.approx(float(spectrum.power[ring]))


def test_a_grid_that_is_not_square_knows_its_frequencies():
    x = torch.cos(2 * math.pi * 0.25 * torch.arange(48.0)).expand(1, 1, 16, 48)
    spectrum = radial_power_spectrum(x)
    assert float(spectrum.frequency[spectrum.power.argmax()]) == pytest.approx(0.25, abs=0.5 / 16)
    turned = radial_power_spectrum(x.transpose(2, 3))
    assert torch.allclose(turned.power, spectrum.power)
    assert torch.allclose(turned.frequency, spectrum.frequency)


@pytest.mark.parametrize("exponent", [-1.0, -2.0, -3.0])
def test_the_slope_of_a_power_law_is_recovered(exponent):
    assert slope(radial_power_spectrum(power_law(exponent, (64, 2, 64, 64)))) == pytest.approx(exponent, abs=0.05)


def test_parseval():
    x = noise(6, 3, 12, 20).double()
    # What is left within the rings: no mean of an image, no corner beyond 0.5.
    radius = torch.hypot(torch.fft.fftfreq(12)[:, None], torch.fft.fftfreq(20)[None])
    inside = (radius > 0.0) & (radius <= 0.5)
    x = torch.fft.ifft2(torch.fft.fft2(x) * inside).real
    spectrum = radial_power_spectrum(x)
    assert int(spectrum.num_frequencies.sum()) == int(inside.sum())
    assert float((spectrum.num_frequencies * spectrum.power).sum()) == pytest.approx(12 * 20)


def test_it_is_numpys_spectrum():
    x = noise(4, 2, 10, 10).double().numpy()
    x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    power = (np.abs(np.fft.fft2(x)) ** 2 / 100).mean((0, 1))
    radius = np.hypot(np.fft.fftfreq(10)[:, None], np.fft.fftfreq(10)[None])
    spectrum = radial_power_spectrum(torch.from_numpy(x))
    for ring in range(5):
        inside = (radius >= (ring + 0.5) / 10) & (radius < (ring + 1.5) / 10) & (radius <= 0.5)
        assert float(spectrum.power[ring]) == pytest.approx(power[inside].mean())
        assert float(spectrum.frequency[ring]) == pytest.approx(radius[inside].mean())
        assert int(spectrum.num_frequencies[ring]) == inside.sum()


def test_scale_and_shift_of_each_channel_do_not_matter():
    x = power_law(-2.0, (8, 3, 16, 16))
    changed = x * torch.tensor([1e-3, 1.0, 50.0])[:, None, None] + torch.tensor([0.0, 7.0, -3.0])[:, None, None]
    assert torch.allclose(radial_power_spectrum(changed).power, radial_power_spectrum(x).power, rtol=1e-3)


def test_batches_and_processes_do_not_matter():
    x = power_law(-1.0, (11, 3, 16, 12))
    expected = radial_power_spectrum(x)
    first, second, idle = SpectrumSums(), SpectrumSums(), SpectrumSums()
    for batch in x[:7].split(2):
        first.add(batch)
    second.add(x[7:])
    idle.merge(second)
    idle.merge(SpectrumSums())
    idle.merge(first)
    found = idle.spectrum()
    assert torch.allclose(found.power, expected.power, rtol=1e-12)
    assert torch.equal(found.frequency, expected.frequency)
    assert found.num_images == 11
    # Merging copies: the sums that were merged stay as they were.
    assert torch.equal(second.spectrum().power, radial_power_spectrum(x[7:]).power)


def test_a_channel_that_never_varies_is_left_out():
    x = noise(8, 2, 16, 16)
    dead = torch.full((8, 1, 16, 16), 0.1)
    spectrum = radial_power_spectrum(torch.cat([x, dead], 1))
    assert torch.allclose(spectrum.power, radial_power_spectrum(x).power)


def test_the_shrunk_image_is_the_latent_without_excess(averaging_autoencoder):
    source = open_images("photos")
    x = to_images([adm_crop(source.read(index), 128) for index in range(4)])
    z = averaging_autoencoder.encode(x).mode()
    latents, images = radial_power_spectrum(2.0 * z - 1.0), radial_power_spectrum(images_on_latent_grid(x, 8))
    assert excess_db(latents, images).numpy() == pytest.approx(0.0, abs=1e-4)
    noisy = radial_power_spectrum(z + z.std() * noise(*z.shape))
    assert high_frequency_excess_db(noisy, images) > 3.0
    assert high_frequency_excess_db(images, noisy) == pytest.approx(-high_frequency_excess_db(noisy, images))


def test_the_excess_of_white_latents_over_a_known_image():
    white, images = radial_power_spectrum(noise(64, 4, 32, 32)), radial_power_spectrum(power_law(-2.0, (64, 3, 32, 32)))
    expected = -10.0 * images.power.log10()
    assert excess_db(white, images).numpy() == pytest.approx(expected.numpy(), abs=0.5)
    upper = images.frequency > 0.25
    assert high_frequency_excess_db(white, images) == pytest.approx(float(expected[upper].mean()), abs=0.2)


def test_other_grids_do_not_mix():
    sums = SpectrumSums()
    sums.add(noise(1, 3, 8, 8))
    with pytest.raises(ValueError, match="3 channels of 8 x 10 cells cannot join a spectrum of 3 channels of 8 x 8"):
        sums.add(noise(1, 3, 8, 10))
    other = SpectrumSums()
    other.add(noise(1, 4, 8, 8))
    with pytest.raises(ValueError, match="cannot join"):
        sums.merge(other)
    assert sums.num_images == 1
    with pytest.raises(ValueError, match="shrink the images"):
        excess_db(radial_power_spectrum(noise(1, 3, 8, 8)), radial_power_spectrum(noise(1, 3, 64, 64)))


def test_faults():
    broken = noise(1, 1, 8, 8)
    broken[0, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        radial_power_spectrum(broken)
    with pytest.raises(ValueError, match="no channel varies"):
        radial_power_spectrum(torch.full((3, 2, 8, 8), 0.1))
    with pytest.raises(ValueError, match="at least 2 x 2 cells"):
        radial_power_spectrum(noise(4, 1, 1, 8))
    with pytest.raises(ValueError, match="at least one image"):
        SpectrumSums().spectrum()
    flat = radial_power_spectrum(noise(4, 1, 1, 1).expand(4, 1, 8, 8))
    with pytest.raises(ValueError, match="has none"):
        excess_db(radial_power_spectrum(noise(1, 1, 8, 8)), flat)
