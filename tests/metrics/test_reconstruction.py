"""PSNR and SSIM on 8-bit images."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eqvae.errors import UserError
from eqvae.metrics.per_image import MAX_PSNR_DB, _check_pictures, psnr_db, ssim


def noisy_pair():
    random = np.random.default_rng(0)
    clean = random.integers(0, 256, (2, 3, 48, 64), dtype=np.uint8)
    noisy = np.clip(clean + random.normal(0, 9, clean.shape), 0, 255).astype(np.uint8)
    return clean, noisy


def test_psnr_agrees_with_scikit_image():
    clean, noisy = noisy_pair()
    ours = psnr_db(torch.from_numpy(clean), torch.from_numpy(noisy))
    theirs = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(clean, noisy, strict=True)]
    assert np.allclose(ours.numpy(), theirs, atol=1e-4)


def test_pictures_of_another_kind_are_refused():
    picture = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    _check_pictures(picture, picture)
    with pytest.raises(UserError, match="images are float32. Give uint8"):
        _check_pictures(picture, picture.float())
    with pytest.raises(UserError, match="shapes .2, 3, 16, 16. and .1, 3, 16, 16."):
        _check_pictures(picture, picture[:1])


def test_ssim_agrees_with_scikit_image():
    clean, noisy = noisy_pair()
    ours = ssim(torch.from_numpy(clean), torch.from_numpy(noisy))
    theirs = [
        structural_similarity(
            a, b, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for a, b in zip(clean, noisy, strict=True)
    ]
    assert np.allclose(ours.numpy(), theirs, atol=2e-3)


def test_equal_images_have_a_finite_psnr():
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert psnr_db(image, image).item() == MAX_PSNR_DB
