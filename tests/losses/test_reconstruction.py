"""L1 and the perceptual distance, summed as in LDM."""

import torch

from eqvae.losses.reconstruction import ReconstructionLoss


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
