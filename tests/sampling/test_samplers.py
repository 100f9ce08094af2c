"""What holds for every sampler: images do not depend on their batch, guidance that does nothing changes nothing."""

from dataclasses import replace

import pytest
import torch

from eqvae.generators.diffusion import GaussianDiffusion
from eqvae.generators.families import find_recipe
from eqvae.generators.interpolant import Interpolant
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.transformer import Transformer
from eqvae.sampling.diffusion import ddim, ddpm
from eqvae.sampling.guidance import classifier_free_guidance
from eqvae.sampling.noise import ImageNoise, balanced_labels
from eqvae.sampling.ode import dopri5, euler, heun
from eqvae.sampling.sde import euler_maruyama

SHAPE, NULL = (4, 4, 4), 10
DIFFUSION, INTERPOLANT = GaussianDiffusion(), Interpolant()

SAMPLERS = {
    "ddpm": (ddpm, DIFFUSION, {"num_steps": 8}),
    "ddim": (ddim, DIFFUSION, {"num_steps": 8}),
    "ddim with noise": (ddim, DIFFUSION, {"num_steps": 8, "eta": 1.0}),
    "euler": (euler, INTERPOLANT, {"num_steps": 8}),
    "heun": (heun, INTERPOLANT, {"num_steps": 8}),
    "dopri5": (dopri5, INTERPOLANT, {}),
    "euler_maruyama": (euler_maruyama, INTERPOLANT, {"num_steps": 8}),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def predict(z, t, labels):
    """Elementwise, different for every label and time."""
    t = t[:, None, None, None] / (1000 if not t.is_floating_point() else 1)
    return torch.sin((1 + 0.3 * labels.to(z.dtype))[:, None, None, None] * z) + t


def sample(name, predict, indices, dtype=torch.float32):
    sampler, process, settings = SAMPLERS[name]
    labels = torch.tensor(list(indices)) % 10
    return sampler(predict, ImageNoise(3, indices, SHAPE, dtype=dtype), labels, process, **settings)


@every_sampler
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_is_the_same_for_any_batch_size(name, batch_size):
    whole = sample(name, predict, range(7))
    parts = [sample(name, predict, range(start, min(start + batch_size, 7))) for start in range(0, 7, batch_size)]
    assert torch.equal(torch.cat(parts), whole)


@every_sampler
def test_an_image_is_the_same_in_any_order(name):
    assert torch.equal(sample(name, predict, [6, 0, 3]), sample(name, predict, range(7))[[6, 0, 3]])


@every_sampler
def test_guidance_of_one_is_no_guidance(name):
    plain = sample(name, predict, range(3))
    assert torch.equal(sample(name, classifier_free_guidance(predict, 1.0, NULL), range(3)), plain)
    assert not torch.equal(sample(name, classifier_free_guidance(predict, 2.0, NULL), range(3)), plain)


@every_sampler
def test_an_interval_without_steps_is_no_guidance(name):
    guided = classifier_free_guidance(predict, 4.0, NULL, interval=(-2.0, -1.0))
    assert torch.equal(sample(name, guided, range(3)), sample(name, predict, range(3)))


@pytest.mark.parametrize("name", ["euler", "euler_maruyama"])
def test_above_the_interval_sampling_is_plain(name):
    sampler, process, settings = SAMPLERS[name]
    states = []
    for model in (predict, classifier_free_guidance(predict, 4.0, NULL, interval=(0.0, 0.5))):
        steps = []
        noise = ImageNoise(3, range(3), SHAPE)
        sampler(model, noise, torch.tensor([0, 1, 2]), process, callback=steps.append, **settings)
        states.append(steps)
    above = [bool(step.t[0] > 0.5) for step in states[0]]
    assert 0 < sum(above) < len(above)
    for step, (plain, guided) in enumerate(zip(*states, strict=True)):
        # A state depends on the steps before it.
        assert torch.equal(plain.z, guided.z) == all(above[:step])


@every_sampler
@pytest.mark.parametrize("channels", [None, 3])
def test_further_channels_of_the_output_do_not_disturb_guidance(name, channels):
    def doubled(z, t, labels):
        output = predict(z, t, labels)
        # v = 1 chooses a variance of beta, which a diffusion takes too where none is learned, but at its first step.
        return torch.cat([output, torch.ones_like(z)], dim=1)

    wide = classifier_free_guidance(doubled, 2.0, NULL, channels=channels)
    narrow = classifier_free_guidance(predict, 2.0, NULL, channels=channels)
    torch.testing.assert_close(sample(name, wide, range(3)), sample(name, narrow, range(3)))


@every_sampler
def test_no_graph_is_kept(name):
    weight = torch.nn.Parameter(torch.ones(()))
    assert not sample(name, lambda z, t, labels: weight * predict(z, t, labels), range(2)).requires_grad


@every_sampler
def test_the_state_stays_wide_around_a_backbone_that_autocasts(name):
    def narrow(z, t, labels):
        assert z.dtype == torch.float32
        return predict(z, t, labels).bfloat16()

    assert sample(name, narrow, range(2)).dtype == torch.float32


@every_sampler
def test_a_transformers_images_depend_on_their_batch_by_rounding_only(name):
    sampler, process, settings = SAMPLERS[name]
    latents = LatentSpecification(channels=4, height=4, width=4, num_classes=10)
    recipe = find_recipe("dit-ti-2" if process is DIFFUSION else "repa-sit-ti-2")
    config = replace(recipe.transformer(latents), depth=2)
    transformer = Transformer(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():  # the first weights' output is zero
        generator = torch.Generator().manual_seed(1)
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    guided = classifier_free_guidance(transformer, 1.5, latents.num_classes)

    def images(indices):
        noise = ImageNoise(3, indices, latents.shape)
        return sampler(guided, noise, balanced_labels(indices, latents.num_classes), process, **settings)

    whole = images(range(3))
    assert whole.isfinite().all()
    alone = torch.cat([images([index]) for index in range(3)])
    assert (whole - alone).abs().max() < 1e-5 * whole.std()
