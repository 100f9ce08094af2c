"""The top three principal components of latents (Figure 1)."""

import torch

from eqvae.drawing.latent_maps import latent_maps


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_change_of_scale_and_shift_per_channel_does_not_show():
    first, second = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    scale, shift = torch.tensor([2.0, 0.5, 10.0, 3.0]).view(4, 1, 1), torch.tensor([1.0, -2.0, 0.0, 5.0]).view(4, 1, 1)
    plain = latent_maps([first, second])
    moved = latent_maps([first, second * scale + shift])
    for before, after in zip(plain, moved, strict=True):
        assert (before.int() - after.int()).abs().max() <= 1


def test_equal_channel_counts_share_one_projection():
    latent = noise(2, 4, 8, 8)
    first, again, other = latent_maps([latent, latent.clone(), noise(2, 4, 4, 4, seed=1)])
    assert torch.equal(first, again)
    assert not torch.equal(first, latent_maps([latent])[0]), "the third autoencoder takes part in the projection"
    assert other.shape == (2, 3, 4, 4)


def test_different_channel_counts_do_not_influence_each_other():
    small, large = noise(2, 4, 8, 8), noise(2, 16, 4, 4, seed=1)
    together = latent_maps([small, large])
    assert torch.equal(together[0], latent_maps([small])[0])
    assert torch.equal(together[1], latent_maps([large])[0])


def test_red_is_the_direction_of_largest_variance():
    pattern = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    latent = torch.cat([pattern, pattern, -pattern, 0.1 * noise(1, 1, 8, 8)], 1)
    red = latent_maps([latent])[0][0, 0].flatten().double()
    correlation = torch.corrcoef(torch.stack([red, pattern.flatten().double()]))[0, 1]
    assert correlation.abs() > 0.99


def test_colours_fill_the_range_and_are_the_same_every_time():
    latent = noise(4, 4, 16, 16)
    drawn = latent_maps([latent])[0]
    assert drawn.dtype == torch.uint8
    assert drawn.amin() == 0
    assert drawn.amax() == 255
    assert torch.equal(drawn, latent_maps([latent.clone()])[0])


def test_fewer_than_three_channels_and_constant_channels_are_grey():
    flat = latent_maps([torch.ones(1, 4, 2, 2)])[0]
    assert flat.unique().tolist() == [128]
    assert latent_maps([noise(1, 2, 4, 4)])[0][:, 2].unique().tolist() == [128]
