"""GAT: sizes, the game's closed forms in float64, what the discriminator sees, styles, and one whole step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eqvae.errors import NotFiniteError, UserError
from eqvae.generators.augmentation import NUM_DRAWS, Augmentation
from eqvae.generators.families import find_recipe
from eqvae.generators.gat import GatConfig, GatObjective, add_noise, noise_levels
from eqvae.generators.gat_layers import rotate, rotation_of
from eqvae.generators.gat_published import from_published, to_published
from eqvae.generators.gat_transformer import GAT_SIZES, GatDiscriminator, GatGenerator, GatNetworkConfig
from eqvae.generators.protocol import LatentSpecification
from eqvae.generators.recipes import PUBLISHED_LATENTS
from eqvae.runs.train_config import TrainConfig
from eqvae.runs.train_cost import training_flops, transformer_flops
from eqvae.runtime.processes import ALONE
from eqvae.training.adversarial_step import AdversarialState, adversarial_step, build_adversarial_state
from eqvae.training.generator_step import TrainingBatch

LATENTS = LatentSpecification(channels=3, height=4, width=6, num_classes=5)
SMALL = GatNetworkConfig(latents=LATENTS, depth=4, hidden_size=24, num_heads=3, patch_size=2, class_size=8)
CONFIG = TrainConfig(
    recipe="gat-ti-2", latents=Path("none"), out=Path("none"), batch_size=6, precision="fp32", learning_rate=1e-3
).resolved()

PUBLISHED = {  # of the authors' code without a teacher, counted on the meta device: generator, discriminator
    "s": (29_361_344, 32_654_464), "b": (116_754_752, 97_331_968), "l": (408_748_576, 315_166_688),
    "xl": (602_251_136, 459_547_456),
}  # fmt: skip


def networks() -> tuple[GatGenerator, GatDiscriminator]:
    """Both with random weights everywhere."""
    generator = torch.Generator().manual_seed(0)
    built = SMALL.build(generator=generator), SMALL.build_discriminator(generator=generator)
    with torch.no_grad():
        for network in built:
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built


def a_batch(num: int = 6, seed: int = 0, objective: GatObjective | None = None) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    return TrainingBatch(
        latents=torch.randn(num, *LATENTS.shape, generator=generator),
        labels=torch.randint(5, (num,), generator=generator),
        draws=(objective or GatObjective()).draw(num, LATENTS, generator),
    )


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", GAT_SIZES)
def test_sizes_have_the_published_number_of_parameters(size: str):
    network, expected = find_recipe(f"gat-{size}-2").transformer(PUBLISHED_LATENTS), GAT_SIZES[size]
    with torch.device("meta"):
        counts = network.build().num_parameters(), network.build_discriminator().num_parameters()
    assert counts == (expected.num_parameters, expected.num_discriminator_parameters)
    if size in PUBLISHED:  # whose generator also embeds latents, and multiplies them by zero
        assert (counts[0] + (2 * 2 * 4 + 1) * network.hidden_size, counts[1]) == PUBLISHED[size]
    else:
        assert 4e6 < sum(counts) < 6e6


def test_the_rate_falls_with_the_width():
    rates = {size: find_recipe(f"gat-{size}-2").values().learning_rate for size in GAT_SIZES}
    assert rates == pytest.approx({size: 2e-4 * 768 / GAT_SIZES[size].hidden_size for size in GAT_SIZES})
    resolved = TrainConfig(recipe="gat-b-2", latents=Path("x"), out=Path("x")).resolved()
    assert (resolved.learning_rate, resolved.adam_beta1, resolved.adam_beta2) == (2e-4, 0.0, 0.99)
    assert (resolved.max_grad_norm, resolved.ema_decay, resolved.watch_steps) == (1.0, 0.999, 1)
    assert (resolved.dit, resolved.sit, resolved.repa, resolved.maskgit) == (None, None, None, None)
    assert resolved.gat == GatConfig()


def test_what_is_not_gats_is_refused():
    given = TrainConfig(recipe="gat-ti-2", latents=Path("x"), out=Path("x"))
    with pytest.raises(UserError, match="--watch-steps 8 is not for 'gat-ti-2'"):
        replace(given, watch_steps=8).resolved()
    with pytest.raises(UserError, match="--label-dropout 0.1 is not for 'gat-ti-2'"):
        find_recipe("gat-ti-2").objective(LATENTS, label_dropout=0.1)
    with pytest.raises(UserError, match="--r1-weight 1.0 is GAT's, and 'sit-ti-2' is no GAT"):
        find_recipe("sit-ti-2", GatConfig(r1_weight=1.0))
    with pytest.raises(UserError, match="depth 6"):
        replace(SMALL, depth=6)


def test_rarer_penalties_cost_less():
    forward, often, rarely = (
        transformer_flops(SMALL),
        training_flops(SMALL, GatObjective()),
        training_flops(SMALL, GatObjective(penalty_every=4)),
    )
    seen = (often - 4 * forward) / 15
    assert rarely == pytest.approx(4 * forward + 10.5 * seen)


# What the discriminator sees ----------------------------------------------------------------------------------------


def test_noise_is_that_of_one_diffusion():
    times = noise_levels()
    assert times == pytest.approx((0.885, 0.76, 0.51, 0.01))
    random = np.random.default_rng(0)
    levels, noise = random.normal(size=(2, 4, 2, 3, 4, 6))
    expected, total, finer = np.zeros_like(levels), 0.0, 0.0
    for level in (3, 2, 1, 0):
        fading = (1 - times[level]) / (1 - finer)
        total = fading * total + np.sqrt(times[level] ** 2 - (finer * fading) ** 2) * noise[level]
        expected[level] = (1 - times[level]) * levels[level] + total
        finer = times[level]
    found = add_noise(torch.from_numpy(levels), torch.from_numpy(noise))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    # As a function of unit noise each level's deviation is its t, whatever the other levels have.
    basis = torch.eye(4, dtype=torch.float64)[:, :, None, None, None]
    weights = add_noise(torch.zeros_like(basis), basis).squeeze()
    np.testing.assert_allclose(weights.square().sum(1).sqrt().numpy(), times, rtol=1e-12)


def test_augmentation_is_that_of_loops():
    random = np.random.default_rng(0)
    uniform, x = random.uniform(size=(40, NUM_DRAWS)), random.normal(size=(40, 2, 8, 12))
    other = random.normal(size=x.shape)
    augmentation = Augmentation.draw(torch.from_numpy(uniform), torch.from_numpy(x))
    found = augmentation(torch.from_numpy(other)).numpy()
    for image in range(40):
        coloured, brightness, saturation, contrast, row, column, row_cut, column_cut, mirrored = uniform[image]
        y = other[image].copy()
        if coloured < 0.5:
            grey = x[image].mean(0)
            y = (y + brightness - 0.5 - grey) * 2 * saturation + grey
            y = (y - x[image].mean()) * (contrast + 0.5) + x[image].mean()
        shifted = np.zeros_like(y)
        down, right = int(row * 3) - 1, int(column * 5) - 2  # an eighth of 8 and of 12, rounded
        for i in range(8):
            for j in range(12):
                if 0 <= i + down < 8 and 0 <= j + right < 12:
                    shifted[:, i, j] = y[:, i + down, j + right]
        top, left = int(row_cut * 9) - 2, int(column_cut * 13) - 3
        shifted[:, max(top, 0) : top + 4, max(left, 0) : left + 6] = 0
        expected = shifted[:, :, ::-1] if mirrored < 0.4 else shifted
        np.testing.assert_allclose(found[image], expected, rtol=1e-10, atol=1e-12)


# The losses ---------------------------------------------------------------------------------------------------------


class LinearGenerator(nn.Module):
    """Levels that are products of style and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 4, *LATENTS.shape, dtype=torch.float64) / 8)

    def forward(self, style: Tensor, labels: Tensor) -> Tensor:
        return torch.einsum("ns,slchw->lnchw", style.double(), self.weight)


class LinearDiscriminator(nn.Module):
    """A logit that is a product, for each class another: its gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, *LATENTS.shape, dtype=torch.float64) / 8)

    def forward(self, levels: Tensor, labels: Tensor) -> Tensor:
        return torch.einsum("lnchw,nlchw->n", levels, self.weight[labels])


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def test_losses_are_their_formulas():
    torch.manual_seed(0)
    generator, discriminator = LinearGenerator(), LinearDiscriminator()
    objective = GatObjective(r1_weight=0.3, r2_weight=0.7, augment=False)
    batch = a_batch()
    draws = {name: value.double() for name, value in batch.draws.items()}
    arguments = (generator, discriminator, batch.latents.double(), batch.labels, draws)
    critical, own = objective.discriminator_loss(*arguments), objective.generator_loss(*arguments)

    style, noise, moves = (draws[name].numpy() for name in ("style", "noise", "perturbation"))
    weight, labels = discriminator.weight.detach().numpy(), batch.labels.numpy()
    drawn = np.einsum("ns,slchw->nlchw", style, generator.weight.detach().numpy())
    true = np.repeat(batch.latents.double().numpy()[:, None], 4, axis=1)
    keep = 1 - np.array(noise_levels())
    blur = [add_noise(torch.zeros(4, 6, 3, 4, 6).double(), draws["noise"][:, i].transpose(0, 1)) for i in range(4)]

    def logit(levels: np.ndarray, which: int) -> np.ndarray:
        seen = levels * keep[None, :, None, None, None] + blur[which].transpose(0, 1).numpy()
        return (seen * weight[labels]).sum((1, 2, 3, 4))

    margin = logit(true, 0) - logit(drawn, 1)
    slope = weight[labels] * keep[None, :, None, None, None]
    r1 = ((slope * moves[:, :1]).sum((1, 2, 3, 4))) ** 2
    r2 = ((slope * moves[:, 1:]).sum((1, 2, 3, 4))) ** 2
    assert noise.shape == (6, 4, 4, 3, 4, 6)
    for name, expected in {"margin": margin, "discriminator": softplus(-margin), "r1": r1, "r2": r2}.items():
        np.testing.assert_allclose(critical.parts[name].numpy(), expected, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(critical.total.detach().numpy(), softplus(-margin) + 0.15 * r1 + 0.35 * r2, rtol=1e-9)
    np.testing.assert_allclose(own.total.detach().numpy(), softplus(logit(true, 2) - logit(drawn, 3)), rtol=1e-9)
    without = objective.discriminator_loss(*arguments, penalize=False)
    np.testing.assert_allclose(without.total.detach().numpy(), softplus(-margin), rtol=1e-9)
    assert without.parts.keys() == {"discriminator", "margin"}


def test_the_penalty_is_the_squared_gradient_on_average():
    """Over many perturbations the difference finds what automatic differentiation finds."""
    _, discriminator = networks()
    discriminator.double()
    objective, batch = GatObjective(), a_batch(num=1)
    num = 1000
    draws = {name: value.double().expand(num, *value.shape[1:]) for name, value in batch.draws.items()}
    draws |= {"perturbation": torch.randn(num, 5, *LATENTS.shape, generator=torch.Generator().manual_seed(0)).double()}
    x = batch.latents.double().requires_grad_()
    one = {name: value[:1] for name, value in draws.items()}
    logit = discriminator(objective._see(x.expand(4, 1, -1, -1, -1), one, 0), batch.labels)
    expected = torch.autograd.grad(logit.sum(), x)[0].square().sum()

    class Still(nn.Module):
        def forward(self, style: Tensor, labels: Tensor) -> Tensor:
            return torch.zeros(4, num, *LATENTS.shape, dtype=torch.float64)

    with torch.no_grad():
        loss = objective.discriminator_loss(
            Still(), discriminator, batch.latents.double().expand(num, -1, -1, -1), batch.labels.expand(num), draws
        )
    assert float(loss.parts["r1"].mean()) == pytest.approx(float(expected), rel=0.2)


# Styles and places --------------------------------------------------------------------------------------------------


def test_rotated_products_depend_on_differences_alone():
    rotation = rotation_of(4, 6, 8, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 25, 8)
    turned = rotate(query, rotation)[0, 0], rotate(key, rotation)[0, 0]
    assert torch.equal(turned[0][0], query[0, 0, 0])  # before the grid
    products = (turned[0][1:] @ turned[1][1:].T).view(4, 6, 4, 6)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 3, 3, 5])
    torch.testing.assert_close(products[1, 4, 1, 1], products[3, 5, 3, 2])
    assert not torch.allclose(products[0, 0, 1, 2], products[0, 0, 2, 1])


@torch.no_grad()
def test_classes_truncation_and_guidance():
    generator, _ = networks()
    noise = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 1])
    levels = generator(noise, labels)
    assert levels.shape == (4, 6, *LATENTS.shape)
    assert not torch.allclose(levels, generator(noise, (labels + 1) % 5), atol=1e-3)
    assert torch.equal(generator(noise, labels, 0.0, 1.0), levels)
    truncated = generator(noise, labels, 1.0)[-1]
    torch.testing.assert_close(truncated[1], truncated[5])  # of one class: its mean style
    assert not torch.allclose(truncated[0], truncated[1], atol=1e-3)
    style = generator.styles(noise, labels)
    halfway = generator.styles(noise, labels, truncation=0.5)
    torch.testing.assert_close(halfway[3], (style[3] + generator.center(3)) / 2)
    mean = torch.stack([generator.styles(noise, torch.full((6,), label)) for label in range(5)]).mean(0)
    torch.testing.assert_close(generator.styles(noise, labels, guidance_scale=2.0), 2 * style - mean)
    many = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(2))
    center = generator.styles(many, torch.full((20_000,), 3)).mean(0)
    torch.testing.assert_close(generator.center(3), center, rtol=0, atol=4 * float(style.std()) / 1024**0.5)


def test_each_level_adds_to_the_one_before():
    generator, _ = networks()
    before = generator(*(a_batch().draws["style"], a_batch().labels))
    with torch.no_grad():
        generator.final_layers[2].linear.bias.add_(1.0)
    change = generator(*(a_batch().draws["style"], a_batch().labels)) - before
    torch.testing.assert_close(change[:2], torch.zeros_like(change[:2]))
    torch.testing.assert_close(change[2:], torch.ones_like(change[2:]))


def test_weights_go_to_the_authors_names_and_back():
    generator, _ = networks()
    published = to_published(SMALL, generator.state_dict())
    added = published.keys() - generator.state_dict().keys()
    assert added == {"x_embedder.proj.weight", "x_embedder.proj.bias", "feat_rope.freqs_cos", "feat_rope.freqs_sin",
                     "w_avg"}  # fmt: skip
    assert published["w_avg"].shape == (5, 24)
    back = from_published(published)
    assert back.keys() == generator.state_dict().keys()
    with torch.device("meta"):
        whole = find_recipe("gat-s-4").transformer(PUBLISHED_LATENTS).build()
    assert find_recipe("gat-s-4").fit(whole.state_dict(), codebook_size=None) == whole.config


# One step -----------------------------------------------------------------------------------------------------------


def a_state(config: TrainConfig = CONFIG, **options) -> AdversarialState:
    generator, discriminator = networks()
    return build_adversarial_state(generator, discriminator, GatObjective(**options), config, torch.device("cpu"))


def step(state: AdversarialState, config: TrainConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    return adversarial_step(state, a_batch(seed=seed), config, ALONE)


def test_each_half_moves_its_own_network():
    state = a_state()
    batch = a_batch()
    before = {name: value.clone() for name, value in state.tensors().items()}
    figures = step(state)
    after = state.tensors()
    for part in ("model.blocks.0.mlp.w3.weight", "discriminator.blocks.0.mlp.w3.weight", "ema.blocks.0.mlp.w3.weight"):
        assert not torch.equal(before[part], after[part])
    assert torch.equal(before["model.pos_embed"], after["model.pos_embed"])
    assert figures.keys() == {
        "loss", "gradient_norm", "discriminator", "margin", "r1", "r2", "discriminator_gradient_norm",
    }  # fmt: skip
    # The discriminator is asked before its step, the generator's loss comes after it.
    first = a_state()
    loss = first.objective.discriminator_loss(*first.networks, batch.latents, batch.labels, batch.draws)
    assert float(figures["discriminator"]) == pytest.approx(float(loss.parts["discriminator"].mean()), rel=1e-5)
    first.load_discriminator(after)
    own = first.objective.generator_loss(*first.networks, batch.latents, batch.labels, batch.draws)
    assert float(figures["loss"]) == pytest.approx(float(own.total.detach().mean()), rel=1e-5)


def test_penalties_come_every_so_often():
    state = a_state(penalty_every=2)
    assert ["r1" in step(state, seed=seed) for seed in range(4)] == [False, True, False, True]


def test_accumulation_gives_the_step_of_the_whole_batch():
    whole, parts = a_state(), a_state()
    figures, accumulated = step(whole), step(parts, replace(CONFIG, gradient_accumulation_steps=3))
    for name in figures:
        torch.testing.assert_close(accumulated[name], figures[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_holds_all_that_the_next_step_depends_on():
    config = replace(CONFIG, posthoc_ema=True, lr_warmup_steps=3)
    straight, resumed = a_state(config), a_state(config)
    for seed in range(2):
        step(straight, config, seed)
    saved = {name: value.clone() for name, value in straight.tensors().items()}
    resumed.load(saved, 2)
    assert torch.equal(step(straight, config, 2)["loss"], step(resumed, config, 2)["loss"])
    expected, found = straight.tensors(), resumed.tensors()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("half", ["discriminator", "generator"])
def test_what_is_not_finite_leaves_the_state_untouched(half: str, monkeypatch: pytest.MonkeyPatch):
    state = a_state()
    step(state)
    before = {name: value.clone() for name, value in state.tensors().items()}
    real = getattr(GatObjective, f"{half}_loss")

    def spoilt(*arguments, **options):
        loss = real(*arguments, **options)
        return replace(loss, total=loss.total * float("nan"))

    monkeypatch.setattr(GatObjective, f"{half}_loss", spoilt)
    with pytest.raises(NotFiniteError, match="loss nan"):
        step(state)
    after = state.tensors()
    assert state.step == 1
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_bf16_is_near_fp32():
    torch.testing.assert_close(
        step(a_state(), replace(CONFIG, precision="bf16"))["loss"], step(a_state())["loss"], rtol=0.05, atol=0.05
    )
